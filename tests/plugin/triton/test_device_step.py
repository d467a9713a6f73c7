"""What a step on the device is made of, and how its counts come back."""

import dataclasses

import numpy as np
import torch

from sparse_attention_hub.sparse_attention.serialization import config_from_dict, config_to_json
from tests.plugin.paged.paged_rows import SINK_LOCAL, shape_of
from tests.plugin.triton.interpreter import DEVICE
from vllm_sparse_plugin.paged.attention import scanned_bytes_per_block
from vllm_sparse_plugin.paged.device.planner import DevicePlanner, Limits
from vllm_sparse_plugin.paged.device.read_counts import CountedGroup, StepReads
from vllm_sparse_plugin.paged.device.step import StepTable, dense_lengths
from vllm_sparse_plugin.paged.group_counts import GroupCounts
from vllm_sparse_plugin.paged.layout import BlockLayout
from vllm_sparse_plugin.paged.page_bounds import PageBounds
from vllm_sparse_plugin.request_parameters import RequestParameters
from vllm_sparse_plugin.statistics import Statistics
from vllm_sparse_plugin.step_plan import DenseRow, SparseRow, flat_queries

QUEST = {"type": "quest_top_k", "heavy_size": 0.25, "page_size": 8, "label_bits": 8}
CONFIG = config_from_dict(
    {"maskers": [*SINK_LOCAL, QUEST], "dense_layers": [0], "layers": {"2": SINK_LOCAL}}
)
LIMITS = Limits(max_queries=4, capacity=64, max_tokens=16)


def planner(indices: tuple = ()) -> DevicePlanner:
    return DevicePlanner(BlockLayout(shape_of(), indices), LIMITS, torch.device(DEVICE), CONFIG)


def with_index() -> DevicePlanner:
    return planner((PageBounds(8, 8),))


def sparse_row(row: int, start: int, end: int, seq_len: int, tag: str | None = None) -> SparseRow:
    parameters = RequestParameters(config_to_json(CONFIG), "f", None, tag)
    return SparseRow(row, start, end, seq_len, parameters)


def test_what_the_dense_backend_sees() -> None:
    """A dense decode, a sparse one, a prompt that becomes sparse, a dense prompt, padding."""
    starts = [0, 1, 2, 8, 12, 12]
    seq_lens = [50, 60, 20, 30, 99]
    dense = [DenseRow(0, 0, 1, 50), DenseRow(2, 2, 4, 16), DenseRow(3, 8, 12, 30)]
    assert dense_lengths(starts, seq_lens, dense).tolist() == [50, 1, 20, 30, 0]


def test_queries_of_rows_one_after_the_other() -> None:
    tokens, owners, lengths = flat_queries([sparse_row(3, 5, 8, 20), sparse_row(0, 0, 1, 7)])
    assert tokens.tolist() == [5, 6, 7, 0]
    assert owners.tolist() == [3, 3, 3, 0]
    assert lengths.tolist() == [18, 19, 20, 7]


def test_layers_by_what_they_do() -> None:
    found = with_index()
    config_json = config_to_json(CONFIG)
    use = found.use(config_json, (0, 1, 2, 3))
    assert (use.fast_layers, use.dense_layers, use.general_layers) == (3, 1, 0)
    assert len(use.attentions) == 2  # of layers 1 and 3, and of layer 2
    with_quest, without = use.attentions
    per_layer = scanned_bytes_per_block(with_quest.paged, found.layout.shape)
    assert per_layer > 0
    assert scanned_bytes_per_block(without.paged, found.layout.shape) == 0
    assert use.scanned_bytes_per_block == 2 * per_layer
    # Blocks without the index, and an engine without the fast path.
    assert planner().use(config_json, (1, 2)).general_layers == 1
    limits = dataclasses.replace(LIMITS, has_fast_path=False)
    none = DevicePlanner(found.layout, limits, torch.device(DEVICE), CONFIG)
    assert none.use(config_json, (0, 1, 2)).general_layers == 2


def test_a_table_has_the_sizes_of_all_lists_and_zeros_for_padding() -> None:
    attentions = with_index().use(config_to_json(CONFIG), (1, 2)).attentions
    table = StepTable(attentions, 4, torch.device(DEVICE))
    table.fill(np.full(4, 9, np.int32), np.full(4, 33, np.int32))
    dense, lengths = np.array([1, 50, 0], np.int32), np.array([40, 0, 0], np.int32)
    table.fill(dense, lengths)
    assert table.whole.tolist() == [1, 50, 0, 0]
    assert table.lengths.tolist() == [40, 0, 0, 0]
    found = table.sizes(3)
    for attention in attentions:
        assert found[attention].tolist() == attention.sizes(lengths).tolist()
        assert (attention.sizes(np.zeros(1)) == 0).all()


def test_counts_of_a_step_are_added_once_and_by_tag() -> None:
    found = with_index()
    shape = found.layout.shape
    use = found.use(config_to_json(CONFIG), (0, 1, 2))
    rows = [sparse_row(0, 0, 2, 11, "a"), sparse_row(2, 5, 6, 40)]
    _, _, lengths = flat_queries(rows)
    counts = torch.tensor([[8, 4, 1], [10, 6, 0], [20, 12, 2]], device=DEVICE)
    places = np.arange(3)
    group = CountedGroup(GroupCounts.of(rows), places, lengths.astype(np.int64), use)
    reads = StepReads((group,), shape, counts, torch.device("cpu"))
    statistics = Statistics()
    statistics.pending[1] = [reads]
    assert not reads.has_arrived
    reads.fetch()
    assert reads.has_arrived
    assert (counts == 0).all()  # there is room for the next step's
    counts += 100
    reads.fetch()  # once is enough
    report = statistics.report("a")
    assert report is not None
    visible = 10 + 11  # of the row's two queries
    assert report["read_keys"] == 18 + visible * shape.num_heads  # and of the dense layer
    assert report["visible_keys"] == 3 * visible * shape.num_heads
    row_bytes = shape.key_value_bytes
    scanned = sum(int(n) * use.scanned_bytes_per_block // shape.block_size for n in (10, 11))
    loaded = 10 * row_bytes + 1 * (row_bytes // 2) + scanned
    assert report["read_bytes"] == loaded + visible * shape.num_kv_heads * row_bytes
    total = statistics.report()
    assert total is not None
    assert total["read_keys"] == 38 + (visible + 40) * shape.num_heads
    assert (counts == 100).all()
