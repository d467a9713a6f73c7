"""Several maskers one after the other, lists and attention: as the numba kernels do it."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from tests.plugin.paged.paged_rows import shape_of
from tests.plugin.triton.device_rows import DeviceRows, device_rows, permuted
from tests.plugin.triton.interpreter import DEVICE
from tests.plugin.triton.unit_flags import SPLIT, poisoned
from tests.tolerances import ATTENTION_ATOL
from vllm_sparse_plugin.paged.attention import NO_SINKS
from vllm_sparse_plugin.paged.kernels import attention as numba_attention
from vllm_sparse_plugin.paged.kernels import lists as numba_lists
from vllm_sparse_plugin.paged.kernels import sampling as numba_sampling
from vllm_sparse_plugin.paged.kernels import selection as numba_selection
from vllm_sparse_plugin.paged.token_lists import TokenLists
from vllm_sparse_plugin.paged.triton_kernels import attention, flags, lists, sampling, selection

HEADS, KV_HEADS, HEAD_SIZE = 4, 2, 32
SINK, WINDOW, PAGE_SIZE = 4, 12, 8
SHARE, SEED, LAYER = 0.1, 3, 9
LENGTHS = (1, 8, 9, 97, 600)
CAPACITY = 608
SCALING = HEAD_SIZE**-0.5

UNWRITTEN = -7.0


@dataclass
class Step:
    """Memory of a step, made once, and the launches that use it."""

    rows: DeviceRows
    scores: torch.Tensor
    counts: torch.Tensor
    units: int

    def __post_init__(self) -> None:
        queries, units = len(self.rows.lengths), queries_units(self)
        self.flags = torch.full((units, CAPACITY), 77, dtype=torch.uint8, device=DEVICE)
        self.probability = torch.zeros(units, device=DEVICE)
        self.order = torch.empty((units, CAPACITY), dtype=torch.int32, device=DEVICE)
        self.lists = lists.DeviceLists.of(
            queries, KV_HEADS, self.units // KV_HEADS, CAPACITY, True, DEVICE
        )
        self.lists.tokens.fill_(1 << 28)
        self.lists.log_weights.fill_(torch.nan)
        self.space = attention.AttentionWorkspace.of(queries, HEADS, KV_HEADS, HEAD_SIZE, DEVICE, 4)
        self.output = torch.full(self.rows.query.shape, UNWRITTEN, device=DEVICE)

    def run(self) -> None:
        lengths = self.rows.batch.lengths
        flags.start_flags(self.flags, lengths)
        flags.flag_range(self.flags, lengths, lengths * 0, lengths.clamp(max=SINK))
        flags.flag_range(self.flags, lengths, lengths - WINDOW, lengths)
        selection.flag_largest(
            self.scores, PAGE_SIZE, self.units, self.counts, 1.0, lengths, self.flags, SPLIT
        )
        sampling.sample_share(
            SHARE,
            SEED,
            LAYER,
            HEADS,
            lengths,
            self.flags,
            self.probability,
            self.order,
            SPLIT,
        )
        lists.list_tokens(self.flags, lengths, self.lists, self.probability)
        attention.attend_lists(
            self.rows.query,
            self.rows.kv_cache,
            self.rows.batch,
            self.lists.tokens,
            self.lists.log_weights,
            self.lists.counts,
            SCALING,
            self.output,
            self.space,
            torch.zeros_like(lengths),
        )


def queries_units(step: Step) -> int:
    return len(step.rows.lengths) * step.units


def random_scores(rows: DeviceRows, units: int, seed: int = 0) -> np.ndarray:
    """Of pages, as many selectors as there are units."""
    random = np.random.default_rng(seed)
    shape = (len(rows.lengths), units, CAPACITY // PAGE_SIZE)
    return random.integers(0, 9, shape).astype(np.float32)


def step_of(rows: DeviceRows, units: int, seed: int = 0) -> Step:
    scores = torch.from_numpy(random_scores(rows, units, seed)).to(DEVICE)
    counts = torch.tensor([2 + length // 50 for length in rows.lengths], device=DEVICE)
    return Step(rows, scores, counts, units)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("units", [HEADS, KV_HEADS])
def test_the_same_keys_and_output_as_numba(dtype: torch.dtype, units: int) -> None:
    rows = device_rows(shape_of(HEADS, KV_HEADS, HEAD_SIZE, 16, dtype), LENGTHS, exact=False)
    host, count = rows.host, len(LENGTHS)
    step = step_of(rows, units)
    step.run()

    lengths = host.batch.lengths
    expected = np.empty((count * units, CAPACITY), np.uint8)
    probability = np.zeros(count * units, np.float32)
    numba_lists.clear_flags(expected, lengths)
    ends = lengths.astype(np.int64)
    for begins, stops in (
        (np.zeros_like(ends), np.minimum(ends, SINK)),
        (np.maximum(ends - WINDOW, 0), ends),
    ):
        numba_selection.flag_range(expected, lengths, begins, stops)
    scores, counts = random_scores(rows, units)[:count], step.counts.cpu().numpy()[:count]
    numba_selection.flag_largest(scores, PAGE_SIZE, units, counts, 1.0, lengths, expected)
    numba_sampling.sample_share(SHARE, SEED, LAYER, HEADS, lengths, expected, probability)
    assert (step.flags[: len(expected)].cpu().numpy() == poisoned(expected, lengths)).all()
    assert (step.flags[len(expected) :] == 77).all()

    found = TokenLists.of(expected, probability, lengths, HEADS, KV_HEADS, is_sampled=True)
    result = np.empty((count, HEADS, HEAD_SIZE), np.float32)
    numba_attention.attend_lists(
        host.query.float().numpy(),
        host.cache.elements,
        host.cache.layout.shape.kind,
        host.cache.layout.shape.block_size,
        host.batch.block_table,
        host.batch.rows,
        found.tokens,
        found.log_weights,
        found.counts,
        SCALING,
        result,
        NO_SINKS,
    )
    output = step.output.cpu().numpy()
    assert np.abs(output[:count] - result).max() <= ATTENTION_ATOL[dtype]
    assert (output[count:] == 0).all()  # padding
    assert (step.lists.counts.view(-1, KV_HEADS)[:count].cpu() > 0).all()


def test_a_second_run_and_other_blocks_change_no_bit() -> None:
    """Whatever the first one has left in the buffers."""
    rows = device_rows(shape_of(HEADS, KV_HEADS, HEAD_SIZE, 16), LENGTHS, exact=False)
    step = step_of(rows, HEADS)
    step.run()
    first = step.output.clone()
    step.scores.copy_(torch.from_numpy(random_scores(rows, HEADS)))
    step.run()
    assert torch.equal(step.output, first)
    other = step_of(permuted(rows), HEADS)
    other.run()
    assert torch.equal(other.output, first)


@pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs need a GPU")
def test_a_graph_replays_with_other_lengths() -> None:
    """Captured with lengths of 0 and 1, replayed with those of the rows, compared with a run."""
    rows = device_rows(shape_of(HEADS, KV_HEADS, HEAD_SIZE, 16), LENGTHS, exact=False)
    expected = step_of(rows, HEADS)
    expected.run()
    lengths, captured = rows.batch.lengths.clone(), step_of(rows, HEADS)
    seen = (torch.arange(len(lengths), device=DEVICE) % 2).to(torch.int32)
    rows.batch.lengths.copy_(torch.minimum(seen, lengths))  # padding has no row of the block table
    captured.run()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.run()
    for number in range(3):
        rows.batch.lengths.copy_(lengths)
        captured.scores.copy_(torch.from_numpy(random_scores(rows, HEADS)))
        captured.output.fill_(UNWRITTEN)
        captured.flags.fill_(number)
        graph.replay()
        assert torch.equal(captured.output, expected.output)
