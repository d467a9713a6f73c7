"""Scores of query heads as scores of the KV heads that select for them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from vllm_sparse_plugin.paged.triton_kernels.grids import (
    await_launches,
    launched,
    overlapped,
    power_of_2,
    programs_per_row,
)

POOLING_TILE = 512
"""Scores whose sum is taken at once. Fixed: sums in other parts would differ in their last bits."""
_WEIGHTS_AT_ONCE = 512
"""Of all heads of a group together."""
_CUT_OFF = tl.constexpr(2.0)
"""In octaves; see `shifts_of`."""
_SCORES_AT_ONCE = 4096
"""Of all heads of a group together; more would take all registers."""


@triton.jit
def weight_of(scores, exponent):
    """The largest exponent (base 2) of a tile, and the sum of powers relative to it.

    Args:
        scores: `[scores]`, float32.
        exponent: Of a score of 1, positive.
    """
    peak = tl.max(scores, 0) * exponent
    # Of nothing but -inf there is no difference to take.
    less = tl.where(peak == float("-inf"), 0.0, peak)
    return peak, tl.sum(tl.exp2(tl.fma(scores, exponent, -less)), 0)


@launched
def _weigh_kernel(
    scores,
    lengths,
    peaks,
    masses,
    exponent,
    stride,
    tiles,
    PAGE_SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    TILE: tl.constexpr,
    IS_OVERLAPPED: tl.constexpr,
):
    """Of each tile of a query head's scores, see `weight_of`."""
    await_launches(IS_OVERLAPPED)
    row = tl.program_id(0).to(tl.int64)
    pages = tl.cdiv(tl.load(lengths + row // HEADS), PAGE_SIZE)
    for tile in range(tl.program_id(1), tl.cdiv(pages, TILE), tl.num_programs(1)):
        places = tile * TILE + tl.arange(0, TILE)
        # A mask that differs between neighbours would make each a load of its own.
        if (tile + 1) * TILE <= pages:
            own = tl.load(scores + row * stride + places)
        else:
            own = tl.load(scores + row * stride + places, mask=places < pages, other=float("-inf"))
        peak, mass = weight_of(own, exponent)
        tl.store(peaks + row * tiles + tile, peak)
        tl.store(masses + row * tiles + tile, mass)


@triton.jit
def shifts_of(
    peaks,
    masses,
    tiles,
    live,
    HEADS: tl.constexpr,
    HEADS_TILE: tl.constexpr,
    AT_ONCE: tl.constexpr,
    TILE: tl.constexpr,
):
    """What exponents (base 2) are less by, so that powers of all heads add up to a mean of shares.

    And a share that is usual: the mean of tiles' logarithms, then moved by the mean of what is left
    of their distances to it when those are cut off. So a few tiles do not count, be they ever so
    high or low.

    Args:
        peaks: Pointer to those of the group's first head, see `PoolingWorkspace`.
        masses: Likewise.
        tiles: From one head's to the next one's.
        live: Tiles of the row.
        HEADS: Of the group.
        HEADS_TILE: The same as an axis.
        AT_ONCE: Tiles that are loaded together.
        TILE: Scores of a tile.

    Returns:
        `[HEADS_TILE]`, float32: inf where there is no such head, or none of its scores is finite.
        And one float32.
    """
    heads, every = tl.arange(0, HEADS_TILE)[:, None], tl.arange(0, AT_ONCE)[None, :]
    peak_of_tiles = tl.full([HEADS_TILE, AT_ONCE], float("-inf"), tl.float32)
    levels = tl.zeros([HEADS_TILE, AT_ONCE], tl.float32)
    for first in range(0, live, AT_ONCE):
        mask = (heads < HEADS) & (first + every < live)
        found = tl.load(peaks + heads * tiles + first + every, mask=mask, other=float("-inf"))
        peak_of_tiles = tl.maximum(peak_of_tiles, found)
        mass_of_tiles = tl.load(masses + heads * tiles + first + every, mask=mask, other=1.0)
        levels += tl.where(found > float("-inf"), found + tl.log2(mass_of_tiles), 0.0)
    peak = tl.max(peak_of_tiles, 1)
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    level = tl.sum(levels, 1) / live
    powers = tl.zeros([HEADS_TILE, AT_ONCE], tl.float32)
    moved = tl.zeros([HEADS_TILE, AT_ONCE], tl.float32)
    for first in range(0, live, AT_ONCE):
        mask = (heads < HEADS) & (first + every < live)
        found = tl.load(peaks + heads * tiles + first + every, mask=mask, other=float("-inf"))
        mass_of_tiles = tl.load(masses + heads * tiles + first + every, mask=mask, other=0.0)
        powers += mass_of_tiles * tl.exp2(found - peak[:, None])
        distance = found + tl.log2(mass_of_tiles) - level[:, None]
        distance = tl.minimum(tl.maximum(distance, -_CUT_OFF), _CUT_OFF)
        moved += tl.where(mask, distance, 0.0)
    mass = tl.sum(powers, 1)
    whole = tl.where(mass > 0, mass, 1.0) * HEADS
    level += tl.sum(moved, 1) / live - peak
    usual = tl.sum(tl.where(mass > 0, tl.exp2(level) / whole, 0.0), 0) / TILE
    return tl.where(mass > 0, peak + tl.log2(whole), float("inf")), usual


@triton.jit
def load_scores(
    scores,
    row_stride,
    first,
    end,
    HEADS: tl.constexpr,
    HEADS_TILE: tl.constexpr,
    STEP: tl.constexpr,
):
    """Scores of some pages, `[HEADS_TILE, STEP]`, float32; -inf from the end on.

    Args:
        scores: Pointer to the row of the group's first head.
        row_stride: From one head's to the next one's.
        first: Of the pages, a multiple of 16.
        end: The one after the last.
        HEADS: Of the group.
        HEADS_TILE: The same as an axis.
        STEP: Pages.
    """
    heads = tl.arange(0, HEADS_TILE)[:, None]
    pages = (first // 16 * 16 + tl.arange(0, STEP))[None, :]  # so that Triton knows of the 16
    own = scores + heads * row_stride + pages
    # A mask that differs between neighbours would make each a load of its own.
    if first + STEP <= end:
        found = tl.load(own, mask=heads < HEADS, other=float("-inf"))
    else:
        found = tl.load(own, mask=(heads < HEADS) & (pages < end), other=float("-inf"))
    return found


@triton.jit
def load_shares(
    scores,
    row_stride,
    shifts,
    scale,
    first,
    end,
    HEADS: tl.constexpr,
    HEADS_TILE: tl.constexpr,
    STEP: tl.constexpr,
):
    """The mean of a group's shares, of some pages, `[STEP]`, float32; 0 from the end on.

    Args:
        scores: See `load_scores`; so all but the next two.
        row_stride: As there.
        shifts: `[HEADS_TILE]`, see `shifts_of`.
        scale: Of the scores, to exponents of 2.
        first: As there.
        end: As there.
        HEADS: As there.
        HEADS_TILE: As there.
        STEP: As there.
    """
    found = load_scores(scores, row_stride, first, end, HEADS, HEADS_TILE, STEP)
    return tl.sum(tl.exp2(found * scale - shifts[:, None]), 0)


@launched
def _share_kernel(
    scores,
    lengths,
    peaks,
    masses,
    scale,
    row_stride,
    tiles,
    PAGE_SIZE: tl.constexpr,
    SELECTORS: tl.constexpr,
    HEADS: tl.constexpr,
    HEADS_TILE: tl.constexpr,
    AT_ONCE: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
):
    """The mean of a group's shares, into the row of its first head."""
    item = tl.program_id(0).to(tl.int64)
    pages = tl.cdiv(tl.load(lengths + item // SELECTORS), PAGE_SIZE)
    steps = tl.cdiv(pages, STEP)
    if tl.program_id(1) < steps:
        scores += item * HEADS * row_stride
        peaks += item * HEADS * tiles
        masses += item * HEADS * tiles
        live = tl.cdiv(pages, TILE)
        shifts, _ = shifts_of(peaks, masses, tiles, live, HEADS, HEADS_TILE, AT_ONCE, TILE)
        for step in range(tl.program_id(1), steps, tl.num_programs(1)):
            first = step * STEP
            shares = load_shares(
                scores, row_stride, shifts, scale, first, pages, HEADS, HEADS_TILE, STEP
            )
            places = first + tl.arange(0, STEP)
            tl.debug_barrier()  # of short rows, several threads load the same scores
            if first + STEP <= pages:
                tl.store(scores + places, shares)
            else:
                tl.store(scores + places, shares, mask=places < pages)


def tiles_at_once(tiles: int, heads: int) -> int:
    """Of each head of a group, for `shifts_of`: as many as registers are there for.

    Args:
        tiles: Of a row.
        heads: Of the group.
    """
    return min(power_of_2(tiles), max(1, _WEIGHTS_AT_ONCE // power_of_2(heads)))


@dataclass(frozen=True)
class PoolingWorkspace:
    """What programs tell each other.

    Attributes:
        peaks: `[max_queries * num_heads, tiles]`, float32: exponents of 2.
        masses: Likewise.
    """

    peaks: torch.Tensor
    masses: torch.Tensor

    @classmethod
    def of(
        cls, max_queries: int, num_heads: int, capacity: int, device: torch.device | str
    ) -> PoolingWorkspace:
        """Asks for the memory.

        Args:
            max_queries: Queries of a launch, at most.
            num_heads: Query heads.
            capacity: Scores of a query head, at most.
            device: Of the kernels.
        """
        shape = (max_queries * num_heads, -(-capacity // POOLING_TILE))
        peaks = torch.empty(shape, dtype=torch.float32, device=device)
        return cls(peaks, torch.empty_like(peaks))

    def check(self, scores: torch.Tensor) -> None:
        """Looks whether there is a place for what is found of scores.

        Args:
            scores: `[num_queries, num_heads, capacity]`.

        Raises:
            ValueError: There is not.
        """
        num_queries, num_heads, capacity = scores.shape
        rows, tiles = self.peaks.shape
        if rows < num_queries * num_heads or tiles * POOLING_TILE < capacity:
            raise ValueError(
                f"a pooling workspace of {tuple(self.peaks.shape)} is too small for scores of "
                f"{tuple(scores.shape)}"
            )


def weigh_scores(
    scores: torch.Tensor,
    page_size: int,
    scaling: float,
    lengths: torch.Tensor,
    workspace: PoolingWorkspace,
) -> None:
    """Finds what shares are relative to, see `pool_scores`.

    Args:
        scores: See there; only read.
        page_size: Keys of a page.
        scaling: Of the scores.
        lengths: Of the rows.
        workspace: Written.

    Raises:
        ValueError: The workspace is too small.
    """
    num_queries, num_heads, capacity = scores.shape
    workspace.check(scores)
    rows, tiles = num_queries * num_heads, workspace.peaks.shape[1]
    _weigh_kernel[(rows, programs_per_row(rows, capacity, POOLING_TILE))](
        scores,
        lengths,
        workspace.peaks,
        workspace.masses,
        scaling * math.log2(math.e),
        capacity,
        tiles,
        PAGE_SIZE=page_size,
        HEADS=num_heads,
        TILE=POOLING_TILE,
        **overlapped(scores.device),
    )


def pool_scores(
    scores: torch.Tensor,
    selectors: int,
    page_size: int,
    scaling: float,
    lengths: torch.Tensor,
    workspace: PoolingWorkspace,
) -> None:
    """The mean, over a group's query heads, of the share of attention that scores give each page.

    The rule of `head_groups.pooled_scores`.

    Args:
        scores: `[num_queries, num_heads, capacity in pages]`, float32, no NaN and no +inf;
            overwritten: a group's shares are in the row of its first head.
        selectors: Groups per query, fewer than heads.
        page_size: Keys of a page.
        scaling: Of the scores.
        lengths: `[num_queries]`, int32.
        workspace: For as many queries and scores.

    Raises:
        ValueError: The workspace is too small.
    """
    num_queries, num_heads, capacity = scores.shape
    items, tiles = num_queries * selectors, workspace.peaks.shape[1]
    heads = num_heads // selectors
    weigh_scores(scores, page_size, scaling, lengths, workspace)
    step = max(128, _SCORES_AT_ONCE // power_of_2(heads))
    _share_kernel[(items, programs_per_row(items, capacity, step))](
        scores,
        lengths,
        workspace.peaks,
        workspace.masses,
        scaling * math.log2(math.e),
        capacity,
        tiles,
        PAGE_SIZE=page_size,
        SELECTORS=selectors,
        HEADS=heads,
        HEADS_TILE=power_of_2(heads),
        AT_ONCE=tiles_at_once(tiles, heads),
        TILE=POOLING_TILE,
        STEP=step,
    )
