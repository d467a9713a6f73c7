"""Numbers of keys (see `key_numbers`) made of labels, without any scores in memory.

Scores of all heads of a group are 4 bytes for each head and key, to be written and read. That is
more than to read labels of a few channels twice, in `label_scores.weigh_labels` and here.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from vllm_sparse_plugin.paged.triton_kernels.channel_labels import QueryLabels
from vllm_sparse_plugin.paged.triton_kernels.grids import (
    await_launches,
    launched,
    overlapped,
)
from vllm_sparse_plugin.paged.triton_kernels.key_numbers import (
    PART_WARPS,
    KeyRows,
    end_part,
    number_keys,
)
from vllm_sparse_plugin.paged.triton_kernels.key_ranges import count_covered
from vllm_sparse_plugin.paged.triton_kernels.label_products import (
    KeyLabels,
    first_label,
    multiply_labels,
)
from vllm_sparse_plugin.paged.triton_kernels.pooling import PoolingWorkspace, shifts_of
from vllm_sparse_plugin.paged.triton_kernels.radix import part_of
from vllm_sparse_plugin.paged.triton_kernels.share_bins import usual_number

_MOST_HEADS = 16
"""Of a KV head: of more, the sums would take too many registers."""


@launched
def _number_labels(
    values,
    scales,
    cache,
    block_table,
    rows,
    numbers,
    lengths,
    counts,
    every,
    ranges,
    peaks,
    masses,
    histograms,
    states,
    places,
    exponent,
    table_stride,
    row_stride,
    ranges_stride,
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
    LISTS: tl.constexpr,
    HEADS: tl.constexpr,
    RANGES: tl.constexpr,
    HAS_EVERY: tl.constexpr,
    HEADS_TILE: tl.constexpr,
    AT_ONCE: tl.constexpr,
    POOLING_TILE: tl.constexpr,
    PARTS: tl.constexpr,
    BINS: tl.constexpr,
    STEP: tl.constexpr,
    WORDS: tl.constexpr,
    IS_OVERLAPPED: tl.constexpr,
):
    """Grid: lists, parts."""
    await_launches(IS_OVERLAPPED)
    item, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    index = item // LISTS
    # The row is asked for together with the length, not when that has come.
    length, row = tl.load(lengths + index), tl.load(rows + index).to(tl.int64)
    begin, end = part_of(length, part, tl.num_programs(1), STEP)
    if begin < end:
        labels = first_label(cache, item % LISTS, 0, OFFSET, STRIDE, ROW_BYTES)
        table = block_table + row * table_stride
        values += item * HEADS * LABEL_WORDS
        scales += item * HEADS * 3
        is_every = tl.load(every + index) > 0 if HAS_EVERY else length < 0
        ranges += index
        is_touched = is_every | (count_covered(begin, end, ranges, ranges_stride, RANGES) > 0)
        numbers += item * HEADS * row_stride
        live_tiles = tl.cdiv(length, POOLING_TILE)
        own_peaks, own_masses = peaks + item * HEADS * tiles, masses + item * HEADS * tiles
        shifts, usual_share = shifts_of(
            own_peaks, own_masses, tiles, live_tiles, HEADS, HEADS_TILE, AT_ONCE, POOLING_TILE
        )
        of_heads = ()
        for head in tl.static_range(HEADS):
            shift = tl.sum(tl.where(tl.arange(0, HEADS_TILE) == head, shifts, 0.0), 0)
            of_heads = of_heads + (shift,)  # type: ignore[assignment]  # noqa: RUF005
        usual = usual_number(usual_share)
        histogram = tl.zeros([BINS], tl.int32)
        for first in range(begin, end, STEP):
            found = multiply_labels(
                labels,
                table,
                first // 16 * 16 + tl.arange(0, STEP),  # so that Triton knows of the 16
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
            share = tl.zeros([STEP], tl.float32)
            for head in tl.static_range(HEADS):
                scale = exponent * tl.load(scales + 3 * head)
                share += tl.exp2(tl.fma(found[head], scale, -of_heads[head]))
            histogram += number_keys(
                share,
                first,
                end,
                is_touched,
                is_every,
                ranges,
                ranges_stride,
                numbers,
                usual,
                RANGES,
                STEP,
                BINS,
            )
        end_part(
            histogram,
            item,
            part,
            length,
            counts + index,
            usual,
            histograms,
            states,
            places,
            PARTS,
            STEP,
            BINS,
            WORDS,
        )


def can_number(labels: KeyLabels, heads: int) -> bool:
    """Whether labels are compared here, and that is less to move than scores.

    Args:
        labels: Of the layer.
        heads: Query heads of a KV head.
    """
    bytes_of_key = labels.row_bytes / labels.kv_cache.shape[2]
    return labels.rows_per_head == 1 and heads <= _MOST_HEADS and bytes_of_key < 8 * heads


def number_labels(
    query: QueryLabels,
    labels: KeyLabels,
    block_table: torch.Tensor,
    batch_rows: torch.Tensor,
    rows: KeyRows,
    scaling: float,
    weights: PoolingWorkspace,
    numbers: torch.Tensor,
) -> None:
    """Writes what `key_numbers.number_scores` does.

    Args:
        query: The channels of each head's row of labels.
        labels: Of the layer, one row per KV head.
        block_table: Of the batch.
        batch_rows: Of the queries.
        rows: To be listed.
        scaling: Of the scores.
        weights: What `label_scores.weigh_labels` has found.
        numbers: `[num_queries, num_heads, capacity]`, of 4 bytes each, contiguous; rows of each
            group's first head are written.

    Raises:
        ValueError: The weights do not fit the rows.
    """
    weights.check(numbers)
    capacity, tiles = numbers.shape[2], weights.peaks.shape[1]
    workspace, (lengths, every, ranges, ranges_stride) = rows.workspace, rows.keys
    _number_labels[rows.grid](
        query.values,
        query.scales,
        labels.kv_cache,
        block_table,
        batch_rows,
        numbers.view(torch.int32),
        lengths,
        rows.counts,
        every,
        ranges,
        weights.peaks,
        weights.masses,
        workspace.histograms,
        workspace.states,
        workspace.places,
        scaling * math.log2(math.e),
        block_table.stride(0),
        capacity,
        ranges_stride,
        tiles,
        **labels.constants(),
        IS_INTERPRETED=not isinstance(_number_labels, triton.JITFunction),
        **rows.constants_of_numbers(tiles),
        enable_fp_fusion=False,
        num_warps=PART_WARPS,
        **overlapped(numbers.device),
    )
