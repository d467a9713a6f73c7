"""The first step of a split selection from pooled scores: it makes shares and numbers in one go."""

from __future__ import annotations

import torch
import triton.language as tl

from vllm_sparse_plugin.paged.triton_kernels.grids import launched, power_of_2
from vllm_sparse_plugin.paged.triton_kernels.pooling import (
    POOLING_TILE,
    PoolingWorkspace,
    shares_of,
    weigh_scores,
)
from vllm_sparse_plugin.paged.triton_kernels.radix import (
    BINS,
    SPLIT_WARPS,
    TILE,
    WORDS,
    add_first_digits,
    live_parts,
    order_of,
    part_of,
)
from vllm_sparse_plugin.paged.triton_kernels.radix_workspace import RadixWorkspace

_STEP = 1024
"""Keys at once; of more, the scores of four heads would take all registers."""
_REGISTERS = 128
"""Of a thread, at most: so 4 programs run at once on a processor; of fewer, it would run out."""


@launched
def _number_kernel(
    scores,
    order,
    flags,
    lengths,
    counts,
    peaks,
    masses,
    histograms,
    states,
    scaling,
    row_stride,
    stride,
    tiles,
    SELECTORS: tl.constexpr,
    HEADS: tl.constexpr,
    UNITS: tl.constexpr,
    TILES: tl.constexpr,
    POOLING_TILE: tl.constexpr,
    BINS: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
    WORDS: tl.constexpr,
):
    """A part's numbers, from the mean of a group's shares, and the row's first digit."""
    item, parts = tl.program_id(0).to(tl.int64), tl.num_programs(1)
    index = item // SELECTORS
    length = tl.load(lengths + index)
    begin, end = part_of(length, tl.program_id(1), parts, TILE)
    if begin < end:
        scores += item * HEADS * row_stride
        order += item * HEADS * row_stride
        peaks += item * HEADS * tiles
        masses += item * HEADS * tiles
        flags += item * UNITS * stride
        histogram = tl.zeros([BINS], tl.int32)
        for first in range(begin, end, STEP):
            keys = first // 16 * 16 + tl.arange(0, STEP)  # so that Triton knows of the 16
            mask = keys < end
            lowest = tl.full([STEP], 255, tl.uint8)
            # Two branches, since masks that differ between neighbours make each a load of its own.
            if first + STEP <= end:
                for unit in range(UNITS):
                    lowest = tl.minimum(lowest, tl.load(flags + unit * stride + keys))
                shares = shares_of(
                    scores,
                    peaks,
                    masses,
                    first,
                    length,
                    scaling,
                    row_stride,
                    tiles,
                    True,
                    HEADS,
                    TILES,
                    POOLING_TILE,
                    STEP,
                )
                number = tl.where(lowest == 0, order_of(shares), 0)
                tl.store(order + keys, number.to(tl.int32, bitcast=True))
            else:
                for unit in range(UNITS):
                    own = tl.load(flags + unit * stride + keys, mask=mask, other=255)
                    lowest = tl.minimum(lowest, own)
                shares = shares_of(
                    scores,
                    peaks,
                    masses,
                    first,
                    length,
                    scaling,
                    row_stride,
                    tiles,
                    False,
                    HEADS,
                    TILES,
                    POOLING_TILE,
                    STEP,
                )
                number = tl.where(lowest == 0, order_of(shares), 0)
                tl.store(order + keys, number.to(tl.int32, bitcast=True), mask=mask)
            histogram += tl.histogram((number >> 24).to(tl.int32), BINS, mask=mask)
        own, state = histograms + item * 4 * BINS, states + item * WORDS
        live = live_parts(length, parts, TILE)
        add_first_digits(histogram, own, state, live, counts, index, 0, 0.0, 0, BINS)


def number_shares(
    scores: torch.Tensor,
    selectors: int,
    counts: torch.Tensor,
    scaling: float,
    lengths: torch.Tensor,
    flags: torch.Tensor,
    workspace: RadixWorkspace,
    pooling: PoolingWorkspace,
) -> None:
    """Replaces the scores of groups' first heads by numbers, and finds rows' first digits.

    What `pool_scores` and the first launch of a split selection do for keys, with the same result.

    Args:
        scores: See `selection.flag_largest`, with a page size of 1; so the others.
        selectors: Fewer than heads.
        counts: Keys to select.
        scaling: Of the scores.
        lengths: Of the rows.
        flags: Only read.
        workspace: For as many rows.
        pooling: See `pool_scores`.

    Raises:
        ValueError: The pooling workspace is too small.
    """
    num_queries, num_heads, capacity = scores.shape
    items = num_queries * selectors
    weigh_scores(scores, 1, scaling, lengths, pooling)
    tiles = pooling.peaks.shape[1]
    _number_kernel[(items, workspace.parts)](
        scores,
        scores.view(torch.int32),
        flags,
        lengths,
        counts,
        pooling.peaks,
        pooling.masses,
        workspace.histograms,
        workspace.states,
        scaling,
        capacity,
        flags.shape[1],
        tiles,
        SELECTORS=selectors,
        HEADS=num_heads // selectors,
        UNITS=len(flags) // items,
        TILES=power_of_2(tiles),
        POOLING_TILE=POOLING_TILE,
        BINS=BINS,
        TILE=TILE,
        STEP=_STEP,
        WORDS=WORDS,
        num_warps=SPLIT_WARPS,
        maxnreg=_REGISTERS,
    )
