"""All lists of maskers of an engine select in the same memory, one after the other."""

import itertools
import logging

import numpy as np
import pytest
import torch

from sparse_attention_hub.sparse_attention.serialization import config_from_dict, config_to_json
from tests.plugin.paged.paged_rows import SINK_LOCAL, make_rows, paged_attention, shape_of
from tests.plugin.triton.device_rows import on_device
from tests.plugin.triton.interpreter import DEVICE
from vllm_sparse_plugin.paged.device import planner as planners
from vllm_sparse_plugin.paged.device.attention import DeviceAttention
from vllm_sparse_plugin.paged.device.cache import DeviceCache
from vllm_sparse_plugin.paged.device.maskers import top_k
from vllm_sparse_plugin.paged.device.planner import DevicePlanner, Limits
from vllm_sparse_plugin.paged.device.space import DeviceMemory, DeviceSpace, queries_within
from vllm_sparse_plugin.paged.layout import BlockLayout
from vllm_sparse_plugin.paged.triton_kernels.lists import DeviceLists

CAPACITY = 320
QUEST = {
    "type": "quest_top_k",
    "heavy_size": 0.2,
    "page_size": 16,
    "label_bits": 8,
    "head_granularity": "kv_head",
}
ORACLE = {"type": "oracle_top_k", "heavy_size": 0.2}
GROUPED = {**ORACLE, "head_granularity": "kv_head"}
SAMPLE = {
    "type": "adaptive_sampling",
    "base_rate_sampling": 0.1,
    "epsilon": 0.5,
    "delta": 0.1,
    "init_offset": 0,
    "local_offset": 0,
}
PQ = {"type": "pq_cache", "heavy_size": 0.2, "pq_sub_dim": 8, "pq_bits": 2}
LISTS = (
    [*SINK_LOCAL, QUEST],
    [*SINK_LOCAL, GROUPED],
    [ORACLE, SAMPLE],
    [{"type": "oracle_top_p", "top_p": 0.7}],
    [*SINK_LOCAL, {**ORACLE, "heavy_size": 0.3}],
    [{"type": "random_sampling", "sampling_rate": 0.2, "head_granularity": "kv_head"}],
)


def space_of(queries: int, memory: DeviceMemory | None = None) -> DeviceSpace:
    return DeviceSpace(shape_of(), queries, CAPACITY, 64, torch.device(DEVICE), 1, memory)


def planner(
    own: list[dict], layout: BlockLayout | None = None, shared: tuple[int, ...] = (), **limits: bool
) -> tuple[DevicePlanner, str]:
    config = config_from_dict({"maskers": own})
    held = DevicePlanner(
        layout or paged_attention(own, shape_of())[1],
        Limits(max_queries=8, capacity=CAPACITY, max_tokens=64, **limits),
        torch.device(DEVICE),
        config,
        shared_layers=frozenset(shared),
    )
    return held, config_to_json(config)


def json_of(maskers: list[dict]) -> str:
    return config_to_json(config_from_dict({"maskers": maskers}))


def test_scratch_of_two_lists_is_the_same_and_what_is_kept_as_well() -> None:
    memory = DeviceMemory(1 << 20, torch.device(DEVICE))
    one, other = space_of(2, memory), space_of(3, memory)
    scores = one.buffer("scores", 10, 7, dtype=torch.float32)
    lists = one.scratch(DeviceLists.of, 2, 2, 1, CAPACITY, False)
    flags = other.buffer("flags", 5, dtype=torch.uint8)
    assert scores.data_ptr() == flags.data_ptr() == memory.scratch.data_ptr()
    # Nothing of one list lies on anything else of it, or off the alignment that kernels expect.
    parts = [scores, lists.tokens, lists.counts, lists.tile_counts, lists.unit_weights]
    places = sorted((part.data_ptr(), part.data_ptr() + part.nbytes) for part in parts)
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(places))
    assert all(begin % 16 == 0 for begin, _ in places)
    assert places[-1][1] <= memory.scratch.data_ptr() + one.scratch_bytes
    assert one.buffer("scores", 10, 7, dtype=torch.float32) is scores
    assert one.scratch(DeviceLists.of, 2, 2, 1, CAPACITY, False) is lists
    kept = one.workspace(torch.zeros, 4)
    assert other.workspace(torch.zeros, 4) is kept
    assert not memory.scratch.data_ptr() <= kept.data_ptr() < places[-1][1]


def test_scratch_that_is_not_there() -> None:
    memory = DeviceMemory(1024, torch.device(DEVICE))
    space = space_of(1, memory)
    space.buffer("first", 512, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="1024 bytes of scratch memory are not enough for 1025"):
        space.buffer("second", 513, dtype=torch.uint8)


def test_queries_within_a_budget() -> None:
    """All of them, or a power of 2; none where one is too much."""
    found = [queries_within(budget, 12, lambda n: 10 * n + 5) for budget in (14, 15, 44, 45, 124)]
    assert found == [0, 1, 2, 4, 8]
    assert queries_within(125, 12, lambda n: 10 * n + 5) == 12


def test_lists_that_take_turns_do_not_disturb_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each in its own number of slices, the first one twice; single keys are listed at once."""
    monkeypatch.setattr(top_k, "MOST_NUMBERS", 64)
    _, layout = paged_attention(LISTS[0], shape_of())
    rows = on_device(make_rows(layout, (1, 33, 200), exact=False))
    scaling = layout.shape.head_size**-0.5

    def attend(attention: DeviceAttention) -> tuple[torch.Tensor, torch.Tensor]:
        cache = DeviceCache.of(rows.kv_cache, layout, 0, space_of(1))
        sizes = torch.from_numpy(attention.sizes(np.array(rows.lengths))).to(DEVICE)
        output = torch.empty(rows.query.shape, device=DEVICE)
        counts = torch.zeros(len(rows.lengths), 3, dtype=torch.int64, device=DEVICE)
        attention.attend(rows.query.float(), cache, rows.batch, sizes, scaling, output, counts)
        return output, counts

    def configs_of(maskers: list[dict]):
        return config_from_dict({"maskers": maskers}).masker_configs

    expected = [attend(DeviceAttention(configs_of(maskers), space_of(8))) for maskers in LISTS]
    monkeypatch.setattr(planners, "CLIENTS_BYTES", 90_000)
    held, own = planner(LISTS[0], layout, brings_maskers=True)
    held.reserve(0)
    size = held.memory.scratch.nbytes
    at_once = []
    for turn in range(len(LISTS) + 1):
        maskers, (output, counts) = LISTS[turn % len(LISTS)], expected[turn % len(LISTS)]
        attention = held.attention(own if maskers is LISTS[0] else json_of(maskers), 0)
        assert attention is not None
        at_once.append(attention.space.max_queries)
        held.memory.scratch.random_(0, 255)  # nobody expects anything of it
        found = attend(attention)
        assert torch.equal(found[0], output)
        assert torch.equal(found[1], counts)
    assert held.memory.scratch.nbytes == size
    assert at_once[0] == 8
    assert 0 < min(at_once) < 8


def test_a_list_that_does_not_fit_takes_the_general_path(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(planners, "CLIENTS_BYTES", 1)
    monkeypatch.setattr(planners, "BUDGET_BYTES", 1)
    held, own = planner(SINK_LOCAL[:1], brings_maskers=True)
    assert held.attention(own, 0) is not None
    brought = json_of([{**ORACLE, "heavy_size": 0.77}])
    with caplog.at_level(logging.WARNING):
        assert held.attention(brought, 0) is None
    assert "to select for one query takes" in caplog.text


def test_own_maskers_have_a_query_at_least(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planners, "BUDGET_BYTES", 1)
    held, own = planner([ORACLE])
    attention = held.attention(own, 0)
    assert attention is not None
    assert attention.space.max_queries == 1


def test_what_was_not_asked_for_long_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """But nothing of the last step, and never the engine's own."""
    monkeypatch.setattr(planners, "_MOST_CONFIGURATIONS", 4)
    held, own = planner(SINK_LOCAL, brings_maskers=True)
    use = held.use(own, (0, 1))
    names = [json_of([{"type": "sink", "sink_size": size}]) for size in range(1, 41)]
    for name in names:
        held.use(name, (0, 1))
        assert held.use(names[0], (0,)).fast_layers == 1
    assert held.use(own, (0, 1)) is use
    most = 2 * held.limits.max_queries
    assert len(held._configurations) == most
    assert set(held._configurations) == {own, names[0], *names[-most + 2 :]}


def test_memory_of_the_general_path_is_taken_once_for_each_list(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of what requests may bring, and of the engine's own lists that take it."""
    taken: list[tuple[str, int]] = []
    monkeypatch.setattr(
        planners, "take_memory", lambda config_json, layer, *limits: taken.append((layer, limits))
    )
    held, _ = planner([*SINK_LOCAL, PQ], shared=(1, 2))
    limits = (held.layout.shape, CAPACITY, 64, held.device)
    held.reserve(0)
    assert taken == []
    held.reserve(1)  # it reads another layer's keys, and what that one has learned of them
    held.reserve(2)
    assert taken == [(1, limits)]

    taken.clear()
    held, _ = planner(SINK_LOCAL, brings_maskers=True)
    held.reserve(1)
    held.reserve(2)
    assert taken == [(0, limits)]

    for lacking in (
        planner([QUEST], BlockLayout(shape_of(), ()))[0],
        planner([QUEST], has_fast_path=False)[0],
    ):
        taken.clear()
        lacking.reserve(3)
        lacking.reserve(4)
        assert taken == [(3, limits)]


def test_dense_layers_take_no_path_and_no_memory(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(planners, "take_memory", lambda *arguments: pytest.fail("memory"))
    held, _ = planner(SINK_LOCAL)
    config = config_from_dict({"maskers": SINK_LOCAL, "dense_layers": [1]})
    layers = frozenset([1])
    held = DevicePlanner(held.layout, held.limits, held.device, config, shared_layers=layers)
    with caplog.at_level(logging.WARNING):
        for layer in (0, 1):
            held.reserve(layer)
    assert caplog.text == ""


def test_nothing_is_kept_for_lists_that_blocks_have_no_index_for() -> None:
    held, _ = planner(SINK_LOCAL, BlockLayout(shape_of(), ()), brings_maskers=True)
    held.reserve(0)
    kept = len(held.memory.kept)
    assert held.attention(json_of([QUEST]), 0) is None
    assert len(held.memory.kept) == kept


@pytest.mark.parametrize(
    ("own", "serves"), [([], True), ([QUEST], True), ([GROUPED, SAMPLE], True), ([PQ], False)]
)
def test_an_index_of_keys_alone_serves_layers_that_share_them(
    own: list[dict], serves: bool
) -> None:
    held, config_json = planner([*SINK_LOCAL, *own], shared=(1,))
    first, shared = (held.attention(config_json, layer) for layer in (0, 1))
    assert first is not None
    assert shared is (first if serves else None)
    use = held.use(config_json, (0, 1))
    assert (use.fast_layers, use.general_layers) == ((2, 0) if serves else (1, 1))


def test_one_key_is_not_all_keys() -> None:
    """Though 1 == 1.0."""
    one = {"type": "oracle_top_k", "heavy_size": 1}
    held, _ = planner(SINK_LOCAL, brings_maskers=True)
    config = config_from_dict({"maskers": [one], "layers": {"1": [{**one, "heavy_size": 1.0}]}})
    first, second = (held.attention(config_to_json(config), layer) for layer in (0, 1))
    lengths = np.array([7], np.int32)
    assert first is not None
    assert second is not None
    assert first.sizes(lengths)[0] == 1
    assert second.sizes(lengths)[0] == 7
