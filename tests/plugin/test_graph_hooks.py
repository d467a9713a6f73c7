"""Two sets of CUDA graphs, and which steps run without any: the hooks, on stand-ins."""

from types import SimpleNamespace
from typing import Any

import pytest

from vllm_sparse_plugin.compat import graph_hooks
from vllm_sparse_plugin.graph_steps import fits_graphs
from vllm_sparse_plugin.request_parameters import RequestParameters
from vllm_sparse_plugin.row_table import GraphState, Row, RowTable

FULL, PIECEWISE = "full", "piecewise"
OWN, OTHER = '{"maskers": "own"}', '{"maskers": "other"}'


def row(config_json: str | None) -> Row:
    return Row(RequestParameters(config_json, "", None, "tag"), 0, 0)


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> RowTable:
    table = RowTable(graphs=GraphState(captured={"layer": OWN}))
    monkeypatch.setattr(graph_hooks, "_table_of", lambda config: table)
    return table


class Manager:
    """Captures like vLLM's: what there is to capture, once each."""

    def __init__(self, table: RowTable, samples: list[int] | None = None) -> None:
        self.vllm_config = None
        self._capture_descs = {FULL: [4, 2], PIECEWISE: [8]}
        self._capture_mem_samples = samples
        self.graphs: dict[Any, Any] = {}
        self.table = table
        self.piecewise = 0
        self.fails = False

    def capture(self, *arguments: Any, progress_bar_desc: str = "") -> None:
        self.piecewise += len(self._capture_descs.get(PIECEWISE, ()))
        for desc in self._capture_descs[FULL]:
            assert desc not in self.graphs
            if self.fails and self.table.graphs.captures_sparse:
                raise RuntimeError("no memory")
            if self._capture_mem_samples is not None:
                self._capture_mem_samples.append(10 * desc)
            self.graphs[desc] = (desc, self.table.graphs.captures_sparse)

    def run_fullgraph(self, desc: Any) -> Any:
        return self.graphs[desc]

    capture_hooked = graph_hooks._capture_twice(capture, FULL)
    run_hooked = graph_hooks._choose_set(run_fullgraph)


def test_each_size_is_captured_without_maskers_and_with_them(table: RowTable) -> None:
    manager = Manager(table)
    manager.capture_hooked("model")
    assert manager.piecewise == 1
    for is_sparse in (False, True, False):
        table.graphs.step_is_sparse = is_sparse
        assert manager.run_hooked(2) == (2, is_sparse)
    assert manager._capture_descs == {FULL: [4, 2], PIECEWISE: [8]}
    assert table.graphs.has_dense_graphs
    assert not table.graphs.captures_sparse  # steps of vLLM's own, without requests, are dense


def test_a_profile_counts_both_sets(table: RowTable) -> None:
    samples: list[int] = []
    manager = Manager(table, samples)
    manager.capture_hooked("model")
    assert samples == [80, 40]
    assert manager._capture_mem_samples is samples


def test_one_set_where_no_graph_can_have_the_maskers(table: RowTable) -> None:
    table.graphs.captured["another group's layer"] = None
    manager = Manager(table)
    manager.capture_hooked("model")
    assert set(manager.graphs.values()) == {(4, False), (2, False)}


def test_a_capture_that_fails_leaves_the_manager_as_it_was(table: RowTable) -> None:
    manager = Manager(table)
    manager.fails = True
    with pytest.raises(RuntimeError, match="no memory"):
        manager.capture_hooked("model")
    assert set(manager.graphs.values()) == {(4, False), (2, False)}
    assert PIECEWISE in manager._capture_descs


def test_engines_without_the_plugin_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_hooks, "_table_of", lambda config: None)
    manager = Manager(RowTable())
    manager.capture_hooked("model")
    assert manager.run_hooked(4) == (4, True)
    assert graph_hooks._avoid_uniform_graphs(lambda *a, **k: (a, k))(manager, 8, True) == (
        (manager, 8, True),
        {},
    )


@pytest.mark.parametrize(
    ("configs", "fits"),
    [([], True), ([None], True), ([OWN, None], True), ([OWN, OTHER], False), ([OTHER], False)],
)
def test_which_batches_graphs_serve(table: RowTable, configs: list, fits: bool) -> None:
    table.rows.update({slot: row(config) for slot, config in enumerate(configs)})
    assert fits_graphs(table, range(9)) is fits
    asked: list[Any] = []
    hooked = graph_hooks._avoid_uniform_graphs(lambda self, *given, **more: asked.append(given))
    hooked(SimpleNamespace(vllm_config=None), 4, True)
    assert asked == [(4, fits)]


def test_runner_v2_looks_at_the_batch_and_not_at_slots_left_over(table: RowTable) -> None:
    """A finished request's row stays until its slot is taken again."""
    runner = SimpleNamespace(
        vllm_config=None, req_states=SimpleNamespace(req_id_to_index={"a": 0, "b": 1})
    )
    looks = graph_hooks._avoid_decode_graphs(lambda self, scheduled, dummy: ("state", 1))
    found = []
    table.rows[2] = row(OTHER)  # of a request that is gone
    for scheduled, rows, dummy in (
        (["a"], {0: row(OWN)}, False),
        (["a", "b"], {1: row(OTHER)}, False),
        (["a"], {}, False),
        (["not a request"], {}, True),
    ):
        table.rows.update(rows)
        output = SimpleNamespace(num_scheduled_tokens=dict.fromkeys(scheduled, 1))
        found.append((*looks(runner, output, dummy), table.graphs.is_dummy))
    assert found == [
        ("state", 1, False),
        ("state", None, False),
        ("state", 1, False),
        ("state", 1, True),
    ]


def test_graphs_serve_what_is_dense_whatever_it_asks_for(table: RowTable) -> None:
    table.rows[0] = row(OTHER)
    table.graphs.is_always_dense = True
    assert fits_graphs(table, [0])


def test_graphs_have_maskers_where_those_of_all_cache_groups_do(table: RowTable) -> None:
    table.graphs.captured["another group's layer"] = OWN
    assert table.graphs.config_json == OWN
    table.graphs.captured["another group's layer"] = None
    assert table.graphs.config_json is None


def test_steps_without_requests_take_dense_graphs(table: RowTable) -> None:
    Manager(table).capture_hooked("model")
    assert not table.graphs.captures_sparse
