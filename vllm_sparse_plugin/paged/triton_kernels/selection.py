"""Choosing the best of a row of scores, and marking what was chosen.

Of long rows, the radix selection of `kernels.selection`, see `radix`; of others, `row_selection`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_sparse_plugin.paged.triton_kernels.grids import launched, power_of_2
from vllm_sparse_plugin.paged.triton_kernels.pooling import PoolingWorkspace, pool_scores
from vllm_sparse_plugin.paged.triton_kernels.radix import (
    BINS,
    LEVELS,
    SPLIT_REGISTERS,
    SPLIT_WARPS,
    TILE,
    WORDS,
    add_first_digits,
    bound_of_row,
    bound_of_state,
    count_digits,
    count_kernel,
    equals_before,
    live_parts,
    order_of,
    part_of,
)
from vllm_sparse_plugin.paged.triton_kernels.radix_workspace import RadixWorkspace
from vllm_sparse_plugin.paged.triton_kernels.row_selection import select_rows

_WARPS = 16
"""Of a program. There are few rows, and each step of a program waits for what it has loaded: the
more of a row it loads at once, the better."""
_KEYS_AT_ONCE = 16 * 32 * _WARPS
"""16 flags of each thread, a load of 16 bytes; of more numbers, registers would run out."""
_KEYS_IN_SPLIT = 16 * 32 * SPLIT_WARPS
"""Likewise, where rows are split."""
_MARK_REGISTERS = 72
"""Of a thread that marks, at most; of fewer, Triton 3.6 would run out."""


@triton.jit
def _order_pages(
    order,
    flags,
    begin,
    end,
    length,
    stride,
    PAGE_SIZE: tl.constexpr,
    UNITS: tl.constexpr,
    PAGES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Replaces the scores of pages by numbers: 0 where all units have all keys.

    Args:
        order: Pointer to the row's scores, and to its numbers.
        flags: Pointer to the flags of the row's first unit.
        begin: First page, a multiple of 16.
        end: The one after the last.
        length: Keys that the query sees.
        stride: From one unit's flags to the next one's.
        PAGE_SIZE: Keys of a page.
        UNITS: Of the row.
        PAGES: At once.
        WIDTH: `PAGE_SIZE` as an axis.
    """
    for first in range(begin, end, PAGES):
        pages = first // 16 * 16 + tl.arange(0, PAGES)  # so that Triton knows of the 16
        mask = pages < end
        # A mask that differs between neighbours would make each a load of its own.
        is_whole = (first + PAGES <= end) & ((first + PAGES) * PAGE_SIZE <= length)
        if is_whole:
            scores = tl.load(order + pages).to(tl.float32, bitcast=True)
        else:
            scores = tl.load(order + pages, mask=mask, other=0).to(tl.float32, bitcast=True)
        if PAGE_SIZE == 1:
            lowest = tl.full([PAGES], 255, tl.uint8)
            for unit in range(UNITS):
                at = flags + unit * stride + pages
                if is_whole:  # noqa: SIM108 (a branch, no selection)
                    own = tl.load(at)
                else:
                    own = tl.load(at, mask=mask, other=255)
                lowest = tl.minimum(lowest, own)
            is_open = lowest == 0
        else:
            inside = tl.arange(0, WIDTH)[None, :]
            keys = pages[:, None] * PAGE_SIZE + inside
            lowest_of_keys = tl.full([PAGES, WIDTH], 255, tl.uint8)
            for unit in range(UNITS):
                at = flags + unit * stride + keys
                if is_whole:
                    own = tl.load(at, mask=inside < PAGE_SIZE, other=255)
                else:
                    own = tl.load(at, mask=(inside < PAGE_SIZE) & (keys < length), other=255)
                lowest_of_keys = tl.minimum(lowest_of_keys, own)
            is_open = tl.min(lowest_of_keys.to(tl.int32), 1) == 0
        number = tl.where(is_open, order_of(scores), 0).to(tl.int32, bitcast=True)
        tl.debug_barrier()  # of few pages, several threads load the same scores
        if is_whole:
            tl.store(order + pages, number)
        else:
            tl.store(order + pages, number, mask=mask)


@triton.jit
def _mark_pages(
    order,
    flags,
    begin,
    end,
    length,
    stride,
    bound,
    room,
    PAGE_SIZE: tl.constexpr,
    UNITS: tl.constexpr,
    PAGES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Selects the pages above a bound, and the first ones that equal it.

    Args:
        order: Pointer to the row's numbers.
        flags: See `_order_pages`; so the next four.
        begin: First page, a multiple of 16.
        end: The one after the last.
        length: Keys that the query sees.
        stride: From one unit's flags to the next one's.
        bound: A number.
        room: How many of those that equal it are selected.
        PAGE_SIZE: See `_order_pages`; so the last three.
        UNITS: Of the row.
        PAGES: At once.
        WIDTH: `PAGE_SIZE` as an axis.
    """
    left = room
    for first in range(begin, end, PAGES):
        pages = first // 16 * 16 + tl.arange(0, PAGES)  # so that Triton knows of the 16
        mask = pages < end
        is_whole = (first + PAGES <= end) & ((first + PAGES) * PAGE_SIZE <= length)
        if is_whole:
            own = tl.load(order + pages).to(tl.uint32, bitcast=True)
        else:
            own = tl.load(order + pages, mask=mask, other=0).to(tl.uint32, bitcast=True)
        is_equal = ((own == bound) & mask).to(tl.int32)
        place = tl.cumsum(is_equal, 0)
        chosen = mask & ((own > bound) | ((is_equal > 0) & (place <= left)))
        left -= tl.sum(is_equal, 0)
        if PAGE_SIZE == 1:
            ones = tl.full([PAGES], 1, tl.uint8)
            for unit in range(UNITS):
                tl.store(flags + unit * stride + pages, ones, mask=chosen)
        else:
            inside = tl.arange(0, WIDTH)[None, :]
            keys = pages[:, None] * PAGE_SIZE + inside
            of_page = (inside < PAGE_SIZE) & chosen[:, None]
            ones_of_page = tl.full([PAGES, WIDTH], 1, tl.uint8)
            for unit in range(UNITS):
                at = flags + unit * stride + keys
                if is_whole:
                    tl.store(at, ones_of_page, mask=of_page)
                else:
                    tl.store(at, ones_of_page, mask=of_page & (keys < length))


@launched
def _select_kernel(
    order,
    flags,
    lengths,
    counts,
    row_stride,
    stride,
    PAGE_SIZE: tl.constexpr,
    SELECTORS: tl.constexpr,
    HEADS: tl.constexpr,
    UNITS: tl.constexpr,
    PAGES: tl.constexpr,
    WIDTH: tl.constexpr,
    BINS: tl.constexpr,
    TILE: tl.constexpr,
):
    """A row's selection by one program."""
    item = tl.program_id(0).to(tl.int64)
    index = item // SELECTORS
    length, wanted = tl.load(lengths + index), tl.load(counts + index).to(tl.int32)
    pages = tl.cdiv(length, PAGE_SIZE)
    if (pages > 0) & (wanted > 0):
        order += item * HEADS * row_stride
        flags += item * UNITS * stride
        _order_pages(order, flags, 0, pages, length, stride, PAGE_SIZE, UNITS, PAGES, WIDTH)
        tl.debug_barrier()  # what one thread has written, another one reads
        histogram = count_digits(order, 0, pages, 0, 0, BINS, TILE)
        bound, room, _ = bound_of_row(order, pages, histogram, wanted, BINS, TILE)
        _mark_pages(
            order, flags, 0, pages, length, stride, bound, room, PAGE_SIZE, UNITS, PAGES, WIDTH
        )


@launched
def _order_kernel(
    order,
    flags,
    lengths,
    counts,
    histograms,
    states,
    row_stride,
    stride,
    PAGE_SIZE: tl.constexpr,
    SELECTORS: tl.constexpr,
    HEADS: tl.constexpr,
    UNITS: tl.constexpr,
    PAGES: tl.constexpr,
    WIDTH: tl.constexpr,
    BINS: tl.constexpr,
    TILE: tl.constexpr,
    WORDS: tl.constexpr,
):
    """A part's numbers, and the row's first digit."""
    item, parts = tl.program_id(0).to(tl.int64), tl.num_programs(1)
    index = item // SELECTORS
    length = tl.load(lengths + index)
    pages = tl.cdiv(length, PAGE_SIZE)
    begin, end = part_of(pages, tl.program_id(1), parts, TILE)
    if begin < end:
        order += item * HEADS * row_stride
        flags += item * UNITS * stride
        _order_pages(order, flags, begin, end, length, stride, PAGE_SIZE, UNITS, PAGES, WIDTH)
        tl.debug_barrier()
        histogram = count_digits(order, begin, end, 0, 0, BINS, TILE)
        own, state = histograms + item * 4 * BINS, states + item * WORDS
        live = live_parts(pages, parts, TILE)
        add_first_digits(histogram, own, state, live, counts, index, 0, 0.0, 0, BINS)


@launched
def _mark_kernel(
    order,
    flags,
    lengths,
    states,
    equals,
    row_stride,
    stride,
    PAGE_SIZE: tl.constexpr,
    SELECTORS: tl.constexpr,
    HEADS: tl.constexpr,
    UNITS: tl.constexpr,
    PAGES: tl.constexpr,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    BINS: tl.constexpr,
    TILE: tl.constexpr,
    WORDS: tl.constexpr,
):
    """Marks a part's pages."""
    item, part, parts = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    length = tl.load(lengths + item // SELECTORS)
    begin, end = part_of(tl.cdiv(length, PAGE_SIZE), part, parts, TILE)
    if begin < end:
        bound, room, equal = bound_of_state(states + item * WORDS)
        if (room > 0) & (room < equal):
            room -= equals_before(equals, item, part, parts, bound, BINS, PARTS)
        order += item * HEADS * row_stride
        flags += item * UNITS * stride
        _mark_pages(
            order, flags, begin, end, length, stride, bound, room, PAGE_SIZE, UNITS, PAGES, WIDTH
        )


def flag_largest(
    scores: torch.Tensor,
    page_size: int,
    selectors: int,
    counts: torch.Tensor,
    scaling: float,
    lengths: torch.Tensor,
    flags: torch.Tensor,
    workspace: RadixWorkspace,
    pooling: PoolingWorkspace | None = None,
) -> None:
    """Selects, per query, the pages with the highest scores that have something left to select.

    With a page size of 1, pages are keys. Equal scores: the lower page wins. Fewer such pages than
    are wanted: all of them.

    Args:
        scores: `[num_queries, num_heads, capacity in pages]`, float32, no NaN, contiguous;
            overwritten.
        page_size: Keys of a page.
        selectors: How many select per query: query heads, or KV heads (pooled). Each selects for
            its share of the units; a page is out when none of them could gain from it.
        counts: `[num_queries]`, an integer type: pages to select.
        scaling: Of the scores, for pooling.
        lengths: `[num_queries]`, int32.
        flags: `[num_queries * num_units, capacity]`, uint8; written.
        workspace: For rows that are split.
        pooling: For scores that are pooled.

    Raises:
        ValueError: Scores are to be pooled without a workspace for it.
    """
    num_queries, num_heads, capacity = scores.shape
    heads, items = num_heads // selectors, num_queries * selectors
    if capacity <= workspace.short_row:
        select_rows(scores, page_size, selectors, counts, scaling, lengths, flags)
        return
    is_split = workspace.splits(items, capacity)
    if heads > 1:
        if pooling is None:
            raise ValueError(f"{num_heads} heads' scores are pooled for {selectors}: no workspace")
        pool_scores(scores, selectors, page_size, scaling, lengths, pooling)
    order = scores.view(torch.int32)
    stride = flags.shape[1]
    width = power_of_2(page_size)
    shape = {
        "PAGE_SIZE": page_size,
        "SELECTORS": selectors,
        "HEADS": heads,
        "UNITS": len(flags) // items,
        "PAGES": max(16, min(TILE, _KEYS_AT_ONCE // width)),
        "WIDTH": width,
        "BINS": BINS,
        "TILE": TILE,
    }
    if not is_split:
        _select_kernel[(items,)](
            order, flags, lengths, counts, capacity, stride, **shape, num_warps=_WARPS
        )
        return
    histograms, states, parts = workspace.histograms, workspace.states, workspace.parts
    equals, grid = workspace.equals, (items, parts)
    shape = {**shape, "PAGES": max(16, min(TILE, _KEYS_IN_SPLIT // width)), "WORDS": WORDS}
    _order_kernel[grid](
        order,
        flags,
        lengths,
        counts,
        histograms,
        states,
        capacity,
        stride,
        **shape,
        num_warps=SPLIT_WARPS,
        maxnreg=SPLIT_REGISTERS,
    )
    for level in range(1, LEVELS):
        count_kernel[grid](
            order,
            lengths,
            histograms,
            states,
            equals,
            capacity,
            PAGE_SIZE=page_size,
            ROWS=selectors,
            HEADS=heads,
            LEVEL=level,
            BINS=BINS,
            TILE=TILE,
            WORDS=WORDS,
            num_warps=SPLIT_WARPS,
            maxnreg=SPLIT_REGISTERS,
        )
    _mark_kernel[grid](
        order,
        flags,
        lengths,
        states,
        equals,
        capacity,
        stride,
        PARTS=power_of_2(parts),
        **shape,
        num_warps=SPLIT_WARPS,
        maxnreg=_MARK_REGISTERS,
    )
