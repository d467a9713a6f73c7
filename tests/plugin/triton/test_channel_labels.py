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
from vllm_sparse_plugin.paged.triton_kernels.channel_labels import (
    QueryLabels,
    label_queries,
    write_labels,
)
from vllm_sparse_plugin.paged.triton_kernels.label_products import KeyLabels
from vllm_sparse_plugin.paged.triton_kernels.label_scores import score_labels, weigh_labels
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


def query_labels(rows: Rows, index: Labels) -> tuple[QueryLabels, np.ndarray]:
    """Of Triton and of numba."""
    shape = rows.cache.layout.shape
    channels = index.channels(shape)
    expected = np.zeros((*rows.query.shape[:2], channels.shape[1]), np.float32)
    numba_kernels.label_queries(rows.query.float().numpy(), channels, index.bits, expected)
    found = QueryLabels.of(*expected.shape, index.bits, DEVICE)
    query, channels = rows.query.to(DEVICE), torch.from_numpy(channels).to(DEVICE)
    label_queries(query, channels, index.bits, SCALE, found)
    return found, expected


def decoded(labels: QueryLabels, count: int, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes, in the channels' order, and the channels themselves times the scale, in float64."""
    values, (step, least, _) = labels.values.cpu(), labels.scales.cpu().double().unbind(-1)
    parts, levels = 8 // bits, (1 << bits) - 1
    quads = values.unflatten(-1, (parts, -1)).unsqueeze(-1)
    codes = ((quads >> (8 * torch.arange(4, dtype=torch.int32))) & 255).flatten(-2)
    assert not codes[..., -(-count // parts) :].any()
    codes = codes[..., : -(-count // parts)].flatten(-2)
    assert not codes[..., count:].any()
    codes = codes[..., :count].double()
    return codes, levels * step[..., None] * (least[..., None] + codes)


def compared(rows: Rows, index: Labels, kv_cache: torch.Tensor, labels: QueryLabels) -> tuple:
    """Arguments of the launchers that compare labels."""
    layout, batch = rows.cache.layout, Batch.of(rows)
    shape, count = layout.shape, index.channels(layout.shape).shape[1]
    row_bytes, bits = index.sizes(shape)
    per_head = index.rows // shape.num_kv_heads
    keys = KeyLabels(kv_cache, layout.place_of(index), row_bytes, bits, count, per_head)
    return labels, keys, batch.block_table, batch.rows


def scores_of(
    rows: Rows, index: Labels, kv_cache: torch.Tensor, labels: QueryLabels, own: np.ndarray
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of Triton and of numba, of the same queries."""
    cache, batch = rows.cache, rows.batch
    shape = cache.layout.shape
    expected = empty_scores(rows).cpu().numpy()
    numba_scores.score_labels(
        own,
        cache.elements,
        shape.kind,
        cache.records,
        cache.layout.place_of(index),
        *index.sizes(shape),
        index.rows // shape.num_kv_heads,
        shape.block_size,
        batch.block_table,
        batch.rows,
        batch.lengths,
        SCALE,
        expected,
    )
    found = empty_scores(rows)
    score_labels(*compared(rows, index, kv_cache, labels), Batch.of(rows).lengths, found)
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
    labels, own = query_labels(rows, index)
    found, expected = scores_of(rows, index, kv_cache, labels, own)
    written = expected != UNWRITTEN
    assert torch.equal(found != UNWRITTEN, written)
    # A channel is made of two terms of at most three times its size, as is a label.
    terms = 9 if index.bits < 16 else 1
    most = torch.where(written, SCALE * terms * largest_products(rows), 0.0)
    assert_close_sums(found, expected, most, own.shape[2])
    weights, again = (poisoned_weights(rows) for _ in range(2))
    lengths = Batch.of(rows).lengths
    weigh_labels(*compared(rows, index, kv_cache, labels), lengths, SCALING, weights)
    pooling.weigh_scores(found.to(DEVICE), 1, SCALING, lengths, again)
    # Once multiplied with both scales, once with one after the other: a rounding more or less.
    torch.testing.assert_close(weights.peaks, again.peaks, rtol=3e-7, atol=0)
    torch.testing.assert_close(weights.masses, again.masses, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("sizes", "index"), [case for case in CASES if case[1].bits < 16], ids=str)
def test_codes_of_queries(sizes: tuple, index: Labels) -> None:
    layout = BlockLayout(shape_of(*sizes), (index,))
    rows = make_rows(layout, (1, 1), exact=False)
    labels, expected = query_labels(rows, index)
    codes, channels = decoded(labels, expected.shape[2], index.bits)
    low, high = expected.min(-1, keepdims=True), expected.max(-1, keepdims=True)
    step = (high - low) / ((1 << index.bits) - 1)
    right = np.rint((expected - low) / np.where(step > 0, step, 1))
    assert torch.equal(codes, torch.from_numpy(right).double())
    own = torch.from_numpy(expected).double()
    # Of a quotient and a product, relative to the query's largest channel.
    error = (channels - SCALE * own).abs() / (SCALE * own.abs().amax(-1, keepdim=True))
    assert error.max() < 1e-6
    total = labels.scales[..., 0] * labels.scales[..., 2]
    sizes_of_channels = SCALE * own.abs().sum(-1)
    assert ((total.cpu() - SCALE * own.sum(-1)).abs() <= 1e-5 * sizes_of_channels).all()


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
    kv_cache = for_device(rows.kv_cache, layout.shape)
    assert torch.equal(*scores_of(rows, index, kv_cache, *query_labels(rows, index)))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_queries_whose_channels_are_all_the_same(bits: int) -> None:
    """Their codes are 0, and the step is of no consequence."""
    index = Labels(1, 4, bits)
    layout = BlockLayout(shape_of(2, 1, 32, 16, F32), (index,))
    rows = make_rows(layout, (1, 20), exact=False)
    rows.query[:, 0], rows.query[:, 1] = 0.0, -1.75
    kv_cache = for_device(rows.kv_cache, layout.shape)
    labels, own = query_labels(rows, index)
    assert not labels.values.any()
    found, expected = scores_of(rows, index, kv_cache, labels, own)
    assert torch.equal(found[:, 0, :20] == 0, expected[:, 0, :20] == 0)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
