"""At which points steps are measured, and what the log says.

Whole engines measure in `tests/plugin/cuda/test_automatic_engines.py`.
"""

import dataclasses

import pytest

from vllm_sparse_plugin import measure_costs
from vllm_sparse_plugin.measure_costs import MOST_KEYS, places, report
from vllm_sparse_plugin.paged.device.cost_model import AttentionCosts, CostModel, StepCosts
from vllm_sparse_plugin.row_table import GraphState, RowTable
from vllm_sparse_plugin.serving_config import ServingConfig


def test_places_of_a_large_engine() -> None:
    found = places(max_rows=256, max_keys=131072, available=400_000)
    assert len(found) == 8  # 64 requests of 8,192 keys would be too many
    assert {rows for rows, _ in found} == {1, 8, 64}
    assert (1, 1024) in found
    assert (8, 32768) in found
    assert (64, MOST_KEYS // 64) in found


@pytest.mark.parametrize(
    ("max_rows", "max_keys", "available"),
    [(1, 16, 16), (4, 128, 1520), (64, 1024, 70), (1000, 1 << 20, 1 << 22), (3, 7, 4000)],
)
def test_places_are_within_what_there_is(max_rows: int, max_keys: int, available: int) -> None:
    found = places(max_rows, max_keys, available)
    assert found == sorted(set(found))
    for rows, keys in found:
        assert 1 <= rows <= max_rows
        assert 1 <= keys <= max_keys
        assert rows * keys <= max(available, rows)


def test_report() -> None:
    launched = AttentionCosts(CostModel(1e-4, 0, 1e-8), CostModel(3e-4, 2e-6, 1e-9, 0.9, 1.1))
    never = dataclasses.replace(launched, sparse=CostModel(1.0, 0, 1e-8))
    text = report(StepCosts(launched, never))
    assert "graphs take 100 us + 0.00 us per request + 10.000 ns per key" in text
    assert "maskers pay at batch 1 never, at batch 4 never" in text
    assert "(measured: 0.90 to 1.10 times that)" in text
    assert f"at batch 1 from {launched.break_even(1)} keys on" in text
    assert "graphs take" not in report(StepCosts(launched, None))


class Builder:
    """Knows nothing that could be measured."""

    is_captured = True


@pytest.mark.parametrize(
    ("options", "graphs"),
    [
        ({"min_sparse_keys": 7}, GraphState({"layer": "own"})),
        ({"fast_path": False}, GraphState({"layer": "own"})),
        ({"maskers": []}, GraphState({"layer": "own"})),
        ({}, GraphState({"layer": None})),  # a layer takes the general path
        ({}, GraphState({"layer": "own"}, is_always_dense=True)),  # speculation
    ],
)
def test_nothing_is_measured_where_nothing_depends_on_it(
    monkeypatch: pytest.MonkeyPatch, options: dict, graphs: GraphState
) -> None:
    config = ServingConfig.parse({"maskers": [{"type": "sink", "sink_size": 4}], **options})
    table = RowTable(graphs=graphs)
    table.builders["layer"] = builder = Builder()
    monkeypatch.setattr(measure_costs.compat, "serving_config", lambda engine: config)
    monkeypatch.setattr(measure_costs, "row_table", lambda engine: table)
    measure_costs.measure_engine(None)  # would fail where it measures
    assert table.costs is None
    assert table.builders["layer"] is builder
