"""Labels of keys (Double Sparsity) compared with queries: for scores, or for what they weigh."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from vllm_sparse_plugin.paged.triton_kernels.channel_labels import QueryLabels
from vllm_sparse_plugin.paged.triton_kernels.grids import await_launches, launched, overlapped
from vllm_sparse_plugin.paged.triton_kernels.label_products import (
    KeyLabels,
    first_label,
    multiply_labels,
)
from vllm_sparse_plugin.paged.triton_kernels.pooling import (
    POOLING_TILE,
    PoolingWorkspace,
    weight_of,
)
from vllm_sparse_plugin.paged.triton_kernels.tiles import splits_of

_MOST_HEADS = 8
"""Of a program; of more, their sums would take too many registers."""
_WARPS, _WEIGHING_WARPS = 4, 1
"""Of a program. What a tile weighs is a sum over all threads: of one warp, none wait for others."""


@launched
def _score_labels(
    values,
    scales,
    cache,
    block_table,
    rows,
    lengths,
    scores,
    peaks,
    masses,
    exponent,
    table_stride,
    scores_stride,
    scores_head_stride,
    tiles,
    BLOCK_BYTES: tl.constexpr,
    OFFSET: tl.constexpr,
    STRIDE: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BITS: tl.constexpr,
    COUNT: tl.constexpr,
    LABEL_WORDS: tl.constexpr,
    IS_INTERPRETED: tl.constexpr,
    ROWS_PER_HEAD: tl.constexpr,
    ALL_HEADS: tl.constexpr,
    HEADS: tl.constexpr,
    TILE: tl.constexpr,
    IS_WEIGHED: tl.constexpr,
    IS_OVERLAPPED: tl.constexpr,
):
    """Grid: queries, groups of `HEADS` query heads that have a row of labels in common, splits.

    Scores are stored, or peaks and masses of each tile of them, see `weight_of`.
    """
    await_launches(IS_OVERLAPPED)
    index, group, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    head = group * HEADS
    row = head // (ALL_HEADS // ROWS_PER_HEAD) % ROWS_PER_HEAD
    labels = first_label(cache, head // ALL_HEADS, row, OFFSET, STRIDE, ROW_BYTES)
    length = tl.load(lengths + index)
    table = block_table + tl.load(rows + index).to(tl.int64) * table_stride
    of_query = index * tl.num_programs(1) * HEADS + head
    values += of_query * LABEL_WORDS
    scales += of_query * 3
    scores += index * scores_stride + head * scores_head_stride
    for tile in tl.range(split, tl.cdiv(length, TILE), tl.num_programs(2)):
        keys = tile * TILE + tl.arange(0, TILE)
        found = multiply_labels(
            labels,
            table,
            keys,
            length,
            values,
            scales,
            cache.dtype.element_ty,
            BLOCK_BYTES,
            BLOCK_SIZE,
            BITS,
            COUNT,
            LABEL_WORDS,
            HEADS,
            IS_INTERPRETED,
        )
        for own in tl.static_range(HEADS):
            scale = tl.load(scales + 3 * own)
            target = scores + own * scores_head_stride + keys
            if IS_WEIGHED:
                product = tl.where(keys < length, found[own], float("-inf"))
                peak, mass = weight_of(product, scale * exponent)
                at = (of_query + own) * tiles + tile
                tl.store(peaks + at, peak)
                tl.store(masses + at, mass)
            # A mask that differs between neighbours would make each a store of its own.
            elif (tile + 1) * TILE <= length:
                tl.store(target, found[own] * scale)
            else:
                tl.store(target, found[own] * scale, mask=keys < length)


def score_labels(
    query: QueryLabels,
    labels: KeyLabels,
    block_table: torch.Tensor,
    rows: torch.Tensor,
    lengths: torch.Tensor,
    scores: torch.Tensor,
) -> None:
    """Dot products of the queries' kept channels with the labels of every key that they see.

    Args:
        query: The channels of each head's row of labels.
        labels: Of the layer.
        block_table: Of the batch; see the package, also for the next two.
        rows: Of the queries.
        lengths: Of the queries.
        scores: A column per key; written.
    """
    _launch(query, labels, block_table, rows, lengths, scores, None, 1.0)


def weigh_labels(
    query: QueryLabels,
    labels: KeyLabels,
    block_table: torch.Tensor,
    rows: torch.Tensor,
    lengths: torch.Tensor,
    scaling: float,
    weights: PoolingWorkspace,
) -> None:
    """What `pooling.weigh_scores` finds of the scores, which are stored nowhere.

    Args:
        query: See `score_labels`; so all but the last two.
        labels: As there.
        block_table: As there.
        rows: As there.
        lengths: As there.
        scaling: Of the scores.
        weights: For as many queries and scores; written.
    """
    _launch(query, labels, block_table, rows, lengths, None, weights, scaling)


def _launch(
    query: QueryLabels,
    labels: KeyLabels,
    block_table: torch.Tensor,
    rows: torch.Tensor,
    lengths: torch.Tensor,
    scores: torch.Tensor | None,
    weights: PoolingWorkspace | None,
    scaling: float,
) -> None:
    """Writes one of the two."""
    num_queries, num_heads, _ = query.values.shape
    if num_queries == 0:
        return
    all_heads = num_heads // labels.kv_cache.shape[1]
    of_row = all_heads // labels.rows_per_head
    heads = next(size for size in range(min(of_row, _MOST_HEADS), 0, -1) if of_row % size == 0)
    groups = num_heads // heads
    if weights is None:
        assert scores is not None
        tiles, memory = -(-scores.shape[2] // POOLING_TILE), [scores] * 3
        strides = scores.stride()[:2]
    else:
        tiles, memory = weights.peaks.shape[1], [weights.peaks, weights.peaks, weights.masses]
        strides = (0, 0)
    _score_labels[(num_queries, groups, splits_of(num_queries * groups, tiles))](
        query.values,
        query.scales,
        labels.kv_cache,
        block_table,
        rows,
        lengths,
        *memory,
        scaling * math.log2(math.e),
        block_table.stride(0),
        *strides,
        tiles,
        **labels.constants(),
        IS_INTERPRETED=not isinstance(_score_labels, triton.JITFunction),
        ROWS_PER_HEAD=labels.rows_per_head,
        ALL_HEADS=all_heads,
        HEADS=heads,
        TILE=POOLING_TILE,
        IS_WEIGHED=weights is not None,
        enable_fp_fusion=False,
        num_warps=_WARPS if weights is None else _WEIGHING_WARPS,
        **overlapped(labels.kv_cache.device),
    )
