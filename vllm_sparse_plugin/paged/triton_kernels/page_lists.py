"""Ranges of keys, and the best pages beside them, as lists of tokens: selected and listed at once.

What most servers do, sinks and a window and then the pages that a KV head's query heads choose
together, needs no flags of single keys: of each page, its overlap with the ranges says all. The
lists are those of `flags`, `selection` and `lists` one after the other, in one launch instead of
four (measured on an H200, 64 lists of 131,072 keys: those took 44 us).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_sparse_plugin.paged.triton_kernels.grids import launched, power_of_2
from vllm_sparse_plugin.paged.triton_kernels.lists import DeviceLists
from vllm_sparse_plugin.paged.triton_kernels.radix import order_of
from vllm_sparse_plugin.paged.triton_kernels.row_selection import (
    RowSizes,
    largest_of,
    pooled_shares,
)

_TOKENS_AT_ONCE = 8192
MOST_RANGES = 2
"""What the union of more covers of a page is not computed here."""


@triton.jit
def _overlap(first, end, begin, stop):
    """How many keys two ranges have in common."""
    return tl.maximum(tl.minimum(end, stop) - tl.maximum(first, begin), 0)


@triton.jit
def _covered(first, end, ranges, stride, RANGES: tl.constexpr):
    """How many keys of [first, end) are in one of the ranges.

    Args:
        first: `[numbers]`, int32.
        end: Likewise.
        ranges: Pointer to where the first range of the query begins; it ends a stride further, and
            the second one begins behind that.
        stride: See above.
        RANGES: How many there are: 0, 1 or 2.
    """
    found = tl.zeros_like(first)
    if RANGES > 0:
        begin, stop = tl.load(ranges), tl.load(ranges + stride)
        found += _overlap(first, end, begin, stop)
        if RANGES > 1:
            other, other_stop = tl.load(ranges + 2 * stride), tl.load(ranges + 3 * stride)
            found += _overlap(first, end, other, other_stop)
            found -= _overlap(first, end, tl.maximum(begin, other), tl.minimum(stop, other_stop))
    return found


@triton.jit
def _list_row(
    scores,
    tokens,
    length,
    wanted,
    is_every,
    ranges,
    scaling,
    row_stride,
    ranges_stride,
    PAGE_SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    RANGES: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    NUMBERS: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """Writes one list, and returns how many tokens it has.

    Args:
        scores: Pointer to those of the group's first head; overwritten.
        tokens: Pointer to the list.
        length: Keys that the query sees, at least 1.
        wanted: Pages to select.
        is_every: Whether all keys are listed.
        ranges: See `_covered`.
        scaling: Of the scores.
        row_stride: From one head's scores to the next one's.
        ranges_stride: See `_covered`.
        PAGE_SIZE: Keys of a page.
        HEADS: Of the group.
        RANGES: See `_covered`.
        WIDTH: `PAGE_SIZE` as an axis.
        CHUNK: Pages whose tokens are written at once.
        NUMBERS: Pages, at most.
        AT_ONCE: Heads.
    """
    places = tl.arange(0, NUMBERS)
    pages = tl.cdiv(length, PAGE_SIZE)
    if HEADS > 1:
        own = pooled_shares(scores, row_stride, places, pages, scaling, HEADS, AT_ONCE)
    else:
        own = tl.load(scores + places, mask=places < pages, other=0.0)
    first = places * PAGE_SIZE
    end = tl.minimum(first + PAGE_SIZE, length)
    size = tl.maximum(end - first, 0)
    covered = tl.minimum(_covered(first, end, ranges, ranges_stride, RANGES), size)
    covered = tl.where(is_every > 0, size, covered)
    is_open = (covered < size) & (places < tl.where(wanted > 0, pages, 0))
    numbers = tl.where(is_open, order_of(own), 0).to(tl.uint32)
    chosen = largest_of(numbers, tl.maximum(wanted, 1))
    # Pages that are listed whole: their tokens are neighbours in the list too.
    is_whole = chosen | (covered == size)
    count = tl.where(is_whole, size, covered)
    start = tl.cumsum(count, 0) - count
    # From here on few pages at a time, out of memory: tokens of all would take too many registers.
    known = scores.to(tl.pointer_type(tl.int32))
    tl.store(known + places, 2 * start + is_whole.to(tl.int32), mask=places < pages)
    tl.debug_barrier()  # what one thread has written, another one reads
    inside = tl.arange(0, WIDTH)
    for chunk in range(0, pages, CHUNK):
        some = chunk + tl.arange(0, CHUNK)
        of_some = tl.load(known + some, mask=some < pages, other=0)[:, None]
        keys_of_some = some[:, None] * PAGE_SIZE + inside[None, :]
        is_listed = (of_some % 2 > 0) & (keys_of_some < length) & (inside < PAGE_SIZE)[None, :]
        tl.store(tokens + of_some // 2 + inside[None, :], keys_of_some, mask=is_listed)
    # Of pages that are not listed whole, what is at the ends of ranges: two of each, at most.
    for edge in tl.static_range(2 * RANGES):
        at = tl.load(ranges + edge * ranges_stride) - edge % 2  # the range's first or last key
        page = tl.maximum(tl.minimum(at, length - 1), 0) // PAGE_SIZE
        of_page = tl.load(known + page)
        keys = page * PAGE_SIZE + inside
        last = tl.minimum((page + 1) * PAGE_SIZE, length)
        own_end = tl.minimum(keys + 1, last)
        is_covered = _covered(keys, own_end, ranges, ranges_stride, RANGES)
        place = of_page // 2 + tl.cumsum(is_covered, 0) - 1
        behind = tl.where(of_page % 2 == 0, last, 0)
        tl.store(tokens + place, keys, mask=(is_covered > 0) & (keys < behind))
    return tl.sum(count, 0)


@launched
def _list_pages_kernel(
    scores,
    lengths,
    counts,
    every,
    ranges,
    tokens,
    listed,
    selected,
    reads,
    scaling,
    row_stride,
    list_stride,
    ranges_stride,
    reads_stride,
    PAGE_SIZE: tl.constexpr,
    LISTS: tl.constexpr,
    HEADS: tl.constexpr,
    RANGES: tl.constexpr,
    HAS_EVERY: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    NUMBERS: tl.constexpr,
    FEWER: tl.constexpr,
    HEADS_AT_ONCE: tl.constexpr,
    MORE_HEADS: tl.constexpr,
):
    """Grid: lists. One of up to `FEWER` pages takes as much less time than one of `NUMBERS`."""
    item = tl.program_id(0).to(tl.int64)
    index = item // LISTS
    length, wanted = tl.load(lengths + index), tl.load(counts + index).to(tl.int32)
    total = tl.zeros_like(length)
    if length > 0:
        is_every = tl.zeros_like(length)
        if HAS_EVERY:
            is_every = tl.load(every + index)
        scores += item * HEADS * row_stride
        tokens += item * list_stride
        ranges += index
        if length <= FEWER * PAGE_SIZE:
            total = _list_row(
                scores,
                tokens,
                length,
                wanted,
                is_every,
                ranges,
                scaling,
                row_stride,
                ranges_stride,
                PAGE_SIZE,
                HEADS,
                RANGES,
                WIDTH,
                CHUNK,
                FEWER,
                MORE_HEADS,
            )
        else:
            total = _list_row(
                scores,
                tokens,
                length,
                wanted,
                is_every,
                ranges,
                scaling,
                row_stride,
                ranges_stride,
                PAGE_SIZE,
                HEADS,
                RANGES,
                WIDTH,
                CHUNK,
                NUMBERS,
                HEADS_AT_ONCE,
            )
        more = total.to(tl.int64)
        tl.atomic_add(reads + index * reads_stride, more * HEADS, sem="relaxed")
        tl.atomic_add(reads + index * reads_stride + 1, more, sem="relaxed")
    tl.store(listed + item, total)
    tl.store(selected + item, total)


def list_pages(
    scores: torch.Tensor,
    page_size: int,
    kv_heads: int,
    counts: torch.Tensor,
    scaling: float,
    lengths: torch.Tensor,
    ranges: torch.Tensor,
    every: torch.Tensor | None,
    lists: DeviceLists,
    reads: torch.Tensor,
) -> None:
    """The positions in some ranges and in the best other pages, ascending, for each KV head.

    Args:
        scores: `[num_queries, num_heads, capacity in pages]`, float32, no NaN, contiguous, of at
            most `row_selection.MOST_NUMBERS` pages; overwritten. They are pooled over each group,
            see `pooling`; of equal ones, the lower page is better.
        page_size: Keys of a page.
        kv_heads: Of the layer.
        counts: `[num_queries]`, an integer type: pages to select, besides those whose keys are all
            in the ranges.
        scaling: Of the scores.
        lengths: `[num_queries]`, int32.
        ranges: `[2 * num_ranges, num_queries]`, int32, of at most `MOST_RANGES`: of each, where it
            begins, and where it ends.
        every: `[num_queries]`, int32: not 0 where all keys are listed; None: nowhere.
        lists: Written, of so many queries; one unit per list, and no weights.
        reads: `[num_queries, 3]`, int64; see `lists.list_tokens`.

    Raises:
        ValueError: There are too many ranges, or the lists do not fit the scores.
    """
    num_queries, num_heads, capacity = scores.shape
    num_lists, num_ranges = num_queries * kv_heads, len(ranges) // 2
    if num_ranges > MOST_RANGES:
        raise ValueError(f"{num_ranges} ranges, but no more than {MOST_RANGES} are listed here")
    if (
        len(lists.tokens) < num_lists
        or lists.tokens.shape[1] < (capacity - 1) * page_size
        or lists.log_weights.shape[1:] != (0, 1)
    ):
        raise ValueError(
            f"lists of {tuple(lists.tokens.shape)} tokens with weights of "
            f"{tuple(lists.log_weights.shape[1:])} cannot hold {num_lists} of {capacity} pages"
        )
    sizes = RowSizes.of(capacity, num_heads // kv_heads)
    _list_pages_kernel[(num_lists,)](
        scores,
        lengths,
        counts,
        lengths if every is None else every,
        ranges if num_ranges else lengths,
        lists.tokens,
        lists.counts,
        lists.selected,
        reads,
        scaling,
        capacity,
        lists.tokens.shape[1],
        ranges.stride(0),
        reads.stride(0),
        PAGE_SIZE=page_size,
        LISTS=kv_heads,
        HEADS=num_heads // kv_heads,
        RANGES=num_ranges,
        HAS_EVERY=every is not None,
        WIDTH=power_of_2(page_size),
        CHUNK=max(1, _TOKENS_AT_ONCE // power_of_2(page_size)),
        NUMBERS=sizes.numbers,
        FEWER=sizes.fewer,
        HEADS_AT_ONCE=sizes.heads,
        MORE_HEADS=sizes.more_heads,
        num_warps=sizes.warps,
    )
