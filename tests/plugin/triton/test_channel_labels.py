"""Labels of keys: the bytes that the numba kernels store, and the scores that they give."""

import functools
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from tests.plugin.paged.paged_rows import Rows, make_rows, shape_of
from tests.plugin.triton.interpreter import DEVICE
from tests.plugin.triton.paged_caches import (
    UNWRITTEN,
    Batch,
    assert_close_sums,
    assert_same_bytes,
    edge_lengths,
    empty_scores,
    largest_products,
    written_again,
)
from tests.plugin.triton.row_order import for_device
from vllm_sparse_plugin.paged.channel_labels import ChannelLabels
from vllm_sparse_plugin.paged.kernels import channel_labels as numba_kernels
from vllm_sparse_plugin.paged.kernels import label_scores as numba_scores
from vllm_sparse_plugin.paged.layout import BlockIndex, BlockLayout, BlockShape, LayerCache
from vllm_sparse_plugin.paged.triton_kernels import label_scores, pooling, tiles
from vllm_sparse_plugin.paged.triton_kernels.channel_labels import label_queries, write_labels
from vllm_sparse_plugin.paged.triton_kernels.label_scores import score_labels
from vllm_sparse_plugin.paged.triton_kernels.pooling import PoolingWorkspace

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
SCALE, SCALING = 0.37, 0.8


@dataclass(frozen=True)
class Labels(BlockIndex):
    """As `ChannelLabels`, with channels of its own instead of a file's."""

    rows: int
    group_factor: int
    bits: int

    def sizes(self, shape: BlockShape) -> tuple[int, int]:
        labels = ChannelLabels("", "", self.group_factor, self.bits)
        return labels.row_bytes(shape), self.bits

    def channels(self, shape: BlockShape) -> np.ndarray:
        random = np.random.default_rng(self.rows)
        every = [random.permutation(shape.head_size) for _ in range(self.rows)]
        return np.stack(every)[:, : shape.head_size // self.group_factor].astype(np.int32)

    def bytes_per_block(self, shape: BlockShape) -> int:
        return self.rows // shape.num_kv_heads * self.sizes(shape)[0]

    def update(self, cache: LayerCache, slots: np.ndarray) -> None:
        shape, place = cache.layout.shape, cache.layout.place_of(self)
        numba_kernels.write_labels(
            cache.elements,
            shape.kind,
            cache.records,
            place,
            *self.sizes(shape),
            self.channels(shape),
            shape.head_size,
            shape.block_size,
            slots,
        )


# Heads, KV heads, head size, block size, type; rows of labels, one channel in, bits
CASES = [
    ((1, 1, 32, 16, F32), Labels(1, 6, 16)),
    ((4, 2, 64, 16, BF16), Labels(4, 4, 16)),
    ((6, 2, 80, 32, F16), Labels(2, 16, 16)),
    ((8, 2, 128, 16, BF16), Labels(8, 8, 8)),
    ((7, 1, 64, 32, F16), Labels(1, 5, 8)),
    ((8, 1, 32, 128, F32), Labels(1, 4, 8)),
    ((4, 2, 80, 16, F32), Labels(2, 16, 4)),
    ((8, 2, 64, 128, BF16), Labels(2, 6, 4)),
    ((3, 1, 128, 32, F16), Labels(3, 32, 4)),
    ((2, 1, 80, 48, BF16), Labels(1, 11, 2)),
    ((14, 2, 32, 16, F16), Labels(2, 4, 2)),
    ((4, 1, 128, 32, F32), Labels(4, 25, 2)),
]


def update(index: Labels, layout: BlockLayout, kv_cache: torch.Tensor, slots: torch.Tensor) -> None:
    shape = layout.shape
    channels = torch.from_numpy(index.channels(shape)).to(DEVICE)
    place = layout.place_of(index)
    write_labels(kv_cache, place, *index.sizes(shape), channels, shape.head_size, slots)


def query_labels(rows: Rows, index: Labels) -> tuple[torch.Tensor, np.ndarray]:
    """Of Triton and of numba."""
    shape = rows.cache.layout.shape
    channels = index.channels(shape)
    expected = np.zeros((*rows.query.shape[:2], channels.shape[1]), np.float32)
    numba_kernels.label_queries(
        rows.query.float().numpy(), channels, index.bits, shape.kind, expected
    )
    found = torch.zeros(expected.shape, device=DEVICE)
    query, channels = rows.query.to(DEVICE), torch.from_numpy(channels).to(DEVICE)
    label_queries(query, channels, index.bits, shape.dtype, found)
    return found, expected


def scores_of(
    rows: Rows,
    index: Labels,
    kv_cache: torch.Tensor,
    labels: torch.Tensor,
    weights: PoolingWorkspace | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of Triton and of numba, of the same queries."""
    cache, batch = rows.cache, rows.batch
    shape = cache.layout.shape
    sizes = (*index.sizes(shape), index.rows // shape.num_kv_heads)
    place = cache.layout.place_of(index)
    expected = empty_scores(rows).cpu().numpy()
    numba_scores.score_labels(
        labels.cpu().numpy(),
        cache.elements,
        shape.kind,
        cache.records,
        place,
        *sizes,
        shape.block_size,
        batch.block_table,
        batch.rows,
        batch.lengths,
        SCALE,
        expected,
    )
    found, on_device = empty_scores(rows), Batch.of(rows)
    score_labels(
        labels,
        kv_cache,
        place,
        *sizes,
        on_device.block_table,
        on_device.rows,
        on_device.lengths,
        SCALE,
        found,
        SCALING,
        weights,
    )
    return found.cpu(), torch.from_numpy(expected)


@pytest.mark.parametrize(("sizes", "index"), CASES, ids=str)
def test_bytes_and_scores(sizes: tuple, index: Labels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "PROGRAMS", 3)  # some rows have more tiles than programs
    for module in (label_scores, pooling):
        monkeypatch.setattr(module, "POOLING_TILE", 64)
    layout = BlockLayout(shape_of(*sizes), (index,))
    rows = make_rows(layout, edge_lengths(layout.shape.block_size), exact=False, spare_keys=2)
    kv_cache = written_again(rows, functools.partial(update, index, layout))
    assert_same_bytes(rows, kv_cache)
    labels, expected_labels = query_labels(rows, index)
    assert torch.equal(labels.cpu(), torch.from_numpy(expected_labels))
    weights, again = (poisoned_weights(rows) for _ in range(2))
    found, expected = scores_of(rows, index, kv_cache, labels, weights)
    written = expected != UNWRITTEN
    assert torch.equal(found != UNWRITTEN, written)
    # In the same order: they differ where one of the processors does not fuse products and sums.
    most = torch.where(written, SCALE * largest_products(rows), 0.0)
    assert_close_sums(found, expected, most, labels.shape[2])
    lengths = Batch.of(rows).lengths
    pooling.weigh_scores(found.to(DEVICE), 1, SCALING, lengths, again)
    assert torch.equal(weights.peaks, again.peaks)
    assert torch.equal(weights.masses, again.masses)


def poisoned_weights(rows: Rows) -> PoolingWorkspace:
    queries, heads, capacity = empty_scores(rows).shape
    weights = PoolingWorkspace.of(queries, heads, capacity, DEVICE)
    for part in (weights.peaks, weights.masses):
        part.fill_(UNWRITTEN)
    return weights


@pytest.mark.parametrize(
    ("sizes", "index"), [case for case in CASES if case[1].bits == 16], ids=str
)
def test_of_small_integers_the_scores_are_the_same(sizes: tuple, index: Labels) -> None:
    layout = BlockLayout(shape_of(*sizes), (index,))
    rows = make_rows(layout, edge_lengths(layout.shape.block_size))
    labels, _ = query_labels(rows, index)
    assert torch.equal(*scores_of(rows, index, for_device(rows.kv_cache, layout.shape), labels))


def test_numbers_that_round_to_the_next_power_of_2() -> None:
    """Of bfloat16, where carrying into the exponent is easily forgotten; and ties go to even."""
    index = Labels(1, 1, 8)
    shape = shape_of(1, 1, 4, 16, BF16)
    query = torch.tensor([[[1.0, 3.984375, 2.0, 3.9921875]], [[-1.0, 0.0, 254.0, 127.5]]])
    channels = index.channels(shape)
    expected = np.zeros((2, 1, 4), np.float32)
    numba_kernels.label_queries(query.numpy(), channels, 8, shape.kind, expected)
    found = torch.zeros(2, 1, 4, device=DEVICE)
    label_queries(query.to(DEVICE), torch.from_numpy(channels).to(DEVICE), 8, BF16, found)
    assert torch.equal(found.cpu(), torch.from_numpy(expected))
    assert 4.0 in found
