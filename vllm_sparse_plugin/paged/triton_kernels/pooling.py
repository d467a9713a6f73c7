"""Scores of query heads as scores of the KV heads that select for them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from vllm_sparse_plugin.paged.triton_kernels.grids import launched, power_of_2, programs_per_row

POOLING_TILE = 1024
"""Scores whose sum is taken at once. Fixed: sums in other parts would differ in their last bits."""
_SHARED_AT_ONCE = 1024
"""Shares that a program works on at once: before, it adds up what is known of all tiles."""


@launched
def _weigh_kernel(
    scores,
    lengths,
    peaks,
    masses,
    scaling,
    stride,
    tiles,
    PAGE_SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Of each tile of a query head's scores: the largest, and the sum of powers relative to it."""
    row = tl.program_id(0).to(tl.int64)
    pages = tl.cdiv(tl.load(lengths + row // HEADS), PAGE_SIZE)
    for tile in range(tl.program_id(1), tl.cdiv(pages, TILE), tl.num_programs(1)):
        places = tile * TILE + tl.arange(0, TILE)
        # A mask that differs between neighbours would make each a load of its own.
        if (tile + 1) * TILE <= pages:
            own = tl.load(scores + row * stride + places)
        else:
            own = tl.load(scores + row * stride + places, mask=places < pages, other=float("-inf"))
        logits = own * scaling
        peak = tl.max(logits, 0)
        # Of nothing but -inf there is no difference to take.
        mass = tl.sum(tl.exp(logits - tl.where(peak == float("-inf"), 0.0, peak)), 0)
        tl.store(peaks + row * tiles + tile, peak)
        tl.store(masses + row * tiles + tile, mass)


@triton.jit
def shares_of(
    scores,
    peaks,
    masses,
    first,
    pages,
    scaling,
    stride,
    tiles,
    IS_WHOLE: tl.constexpr,
    HEADS: tl.constexpr,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
):
    """The mean of a group's shares, of some pages.

    Args:
        scores: Pointer to the row of the group's first head; so the next two.
        peaks: See `PoolingWorkspace`.
        masses: Likewise.
        first: Of the pages, a multiple of 16.
        pages: Of the row.
        scaling: Of the scores.
        stride: From one row of scores to the next.
        tiles: Likewise, of peaks and masses.
        IS_WHOLE: All pages are of the row: masks that differ between neighbours would make each a
            load of its own.
        HEADS: Of the group.
        TILES: `tiles` as an axis.
        TILE: Pages of a tile.
        STEP: Pages.

    Returns:
        `[STEP]`, float32.
    """
    every = tl.arange(0, TILES)
    live = tl.cdiv(pages, TILE)
    places = first // 16 * 16 + tl.arange(0, STEP)  # so that Triton knows of the 16
    shares = tl.zeros([STEP], tl.float32)
    # Unrolled, so that heads do not wait for each other's loads.
    for head in tl.range(HEADS, loop_unroll_factor=4):
        of_head = head * tiles + every
        found = tl.load(peaks + of_head, mask=every < live, other=float("-inf"))
        parts = tl.load(masses + of_head, mask=every < live, other=0.0)
        peak = tl.max(found, 0)
        peak = tl.where(peak == float("-inf"), 0.0, peak)
        mass = tl.sum(parts * tl.exp(found - peak), 0) * HEADS
        at = scores + head * stride + places
        own = tl.load(at) if IS_WHOLE else tl.load(at, mask=places < pages, other=float("-inf"))
        shares += tl.exp(own * scaling - peak) / tl.where(mass > 0, mass, 1.0)
    return shares


@launched
def _share_kernel(
    scores,
    lengths,
    peaks,
    masses,
    scaling,
    stride,
    tiles,
    PAGE_SIZE: tl.constexpr,
    SELECTORS: tl.constexpr,
    HEADS: tl.constexpr,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
):
    """The mean of a group's shares, into the row of its first head."""
    item = tl.program_id(0).to(tl.int64)
    pages = tl.cdiv(tl.load(lengths + item // SELECTORS), PAGE_SIZE)
    scores += item * HEADS * stride
    peaks += item * HEADS * tiles
    masses += item * HEADS * tiles
    for step in range(tl.program_id(1), tl.cdiv(pages, STEP), tl.num_programs(1)):
        first = step * STEP
        places = first + tl.arange(0, STEP)
        if first + STEP <= pages:
            shares = shares_of(
                scores,
                peaks,
                masses,
                first,
                pages,
                scaling,
                stride,
                tiles,
                True,
                HEADS,
                TILES,
                TILE,
                STEP,
            )
            tl.store(scores + places, shares)
        else:
            shares = shares_of(
                scores,
                peaks,
                masses,
                first,
                pages,
                scaling,
                stride,
                tiles,
                False,
                HEADS,
                TILES,
                TILE,
                STEP,
            )
            tl.store(scores + places, shares, mask=places < pages)


@dataclass(frozen=True)
class PoolingWorkspace:
    """What programs tell each other.

    Attributes:
        peaks: `[max_queries * num_heads, tiles]`, float32.
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
    rows, tiles = num_queries * num_heads, workspace.peaks.shape[1]
    if len(workspace.peaks) < rows or tiles * POOLING_TILE < capacity:
        raise ValueError(
            f"a pooling workspace of {tuple(workspace.peaks.shape)} is too small for scores of "
            f"{tuple(scores.shape)}"
        )
    _weigh_kernel[(rows, programs_per_row(rows, capacity, POOLING_TILE))](
        scores,
        lengths,
        workspace.peaks,
        workspace.masses,
        scaling,
        capacity,
        tiles,
        PAGE_SIZE=page_size,
        HEADS=num_heads,
        TILE=POOLING_TILE,
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
    weigh_scores(scores, page_size, scaling, lengths, workspace)
    _share_kernel[(items, programs_per_row(items, capacity, _SHARED_AT_ONCE))](
        scores,
        lengths,
        workspace.peaks,
        workspace.masses,
        scaling,
        capacity,
        tiles,
        PAGE_SIZE=page_size,
        SELECTORS=selectors,
        HEADS=num_heads // selectors,
        TILES=power_of_2(tiles),
        TILE=POOLING_TILE,
        STEP=_SHARED_AT_ONCE,
    )
