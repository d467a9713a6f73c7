"""Ranges of keys, and the best pages beside them, as lists of tokens: selected and listed at once.

What most servers do, sinks and a window and then the pages that a KV head's query heads choose
together, needs no flags of single keys: of each page, its overlap with the ranges says all. The
lists are those of `flags`, `selection` and `lists` one after the other, in one launch instead of
four (measured on an H200, 64 lists of 131,072 keys: those took 44 us).
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from vllm_sparse_plugin.paged.triton_kernels.grids import (
    await_launches,
    launched,
    overlapped,
    power_of_2,
)
from vllm_sparse_plugin.paged.triton_kernels.key_ranges import MOST_RANGES, count_covered
from vllm_sparse_plugin.paged.triton_kernels.lists import DeviceLists
from vllm_sparse_plugin.paged.triton_kernels.radix import load_numbers, order_of
from vllm_sparse_plugin.paged.triton_kernels.row_selection import (
    bound_of,
    chosen_of,
    extremes_of,
    no_extremes,
    row_capacity,
    sizes_of_chunks,
)
from vllm_sparse_plugin.paged.triton_kernels.row_shares import shifts_of_row, values_of_chunk

_TOKENS_AT_ONCE = 8192


@triton.jit
def _sizes_of(
    places,
    length,
    is_every,
    ranges,
    stride,
    PAGE_SIZE: tl.constexpr,
    RANGES: tl.constexpr,
):
    """How many keys some pages have, and how many of them ranges cover; see `count_covered`.

    Args:
        places: `[pages]`.
        length: Keys that the query sees.
        is_every: Whether all are covered.
        ranges: See `count_covered`; so the next one and the last.
        stride: As there.
        PAGE_SIZE: Keys of a page.
        RANGES: As there.
    """
    first = places * PAGE_SIZE
    end = tl.minimum(first + PAGE_SIZE, length)
    size = tl.maximum(end - first, 0)
    covered = tl.minimum(count_covered(first, end, ranges, stride, RANGES), size)
    return size, tl.where(is_every, size, covered)


@triton.jit
def _write_edge(tokens, first, end, ranges, stride, WIDTH: tl.constexpr, RANGES: tl.constexpr):
    """Lists what ranges cover of a page.

    Args:
        tokens: Pointer to where the page's first token goes.
        first: Its first key.
        end: The one after its last.
        ranges: See `count_covered`; so the next one and the last.
        stride: As there.
        WIDTH: Keys of a page as an axis.
        RANGES: As there.
    """
    key = first + tl.arange(0, WIDTH)
    key_end = tl.minimum(key + 1, end)
    is_covered = count_covered(key, key_end, ranges, stride, RANGES)
    place = tl.cumsum(is_covered, 0) - 1
    tl.store(tokens + place, key, mask=(is_covered > 0) & (key < end))


@triton.jit
def _complete_pages(
    tokens,
    starts,
    number,
    length,
    PAGE_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    WRITTEN: tl.constexpr,
):
    """Lists all tokens of the pages of which the first one is listed.

    Args:
        tokens: Pointer to the list.
        starts: Pointer to where in the list each of these pages begins, int32.
        number: How many they are.
        length: Keys that the query sees: the last page may have fewer than others.
        PAGE_SIZE: Keys of a page.
        WIDTH: The same as an axis.
        WRITTEN: Pages at once.
    """
    in_page = tl.arange(0, WIDTH)
    for first in range(0, number, WRITTEN):
        some = first + tl.arange(0, WRITTEN)
        is_page = some < number
        place = tl.load(starts + some, mask=is_page, other=0)
        key = tl.load(tokens + place, mask=is_page, other=length)
        keys = key[:, None] + in_page[None, :]
        is_listed = (keys < length) & (in_page < PAGE_SIZE)[None, :]
        tl.store(tokens + place[:, None] + in_page[None, :], keys, mask=is_listed)


@launched
def _list_pages_kernel(
    scores,
    lengths,
    counts,
    every,
    ranges,
    tokens,
    listed,
    reads,
    scale,
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
    WRITTEN: tl.constexpr,
    AT_ONCE: tl.constexpr,
    CHUNK: tl.constexpr,
    BITS: tl.constexpr,
    PAIR: tl.constexpr,
    IS_OVERLAPPED: tl.constexpr,
):
    """Grid: lists. `WRITTEN` pages' tokens are written at once.

    A chunk's tokens are counted in `BITS` bits, with its pages in the bits above, in a `PAIR`.
    """
    await_launches(IS_OVERLAPPED)
    item = tl.program_id(0).to(tl.int64)
    index = item // LISTS
    length, wanted = tl.load(lengths + index), tl.load(counts + index).to(tl.int32)
    total = tl.zeros_like(length)
    if length > 0:
        is_every = tl.load(every + index) > 0 if HAS_EVERY else length < 0
        scores += item * HEADS * row_stride
        tokens += item * list_stride
        ranges += index
        # Pages' scores make way for their numbers, and those for places in the list.
        memory = scores.to(tl.pointer_type(tl.int32))
        pages, inside = tl.cdiv(length, PAGE_SIZE), tl.arange(0, CHUNK)
        shifts = (scale,)
        if HEADS > 1:
            shifts = shifts_of_row(scores, row_stride, pages, scale, HEADS, AT_ONCE, CHUNK)
        lowest, highest, counted = no_extremes(CHUNK)
        for chunk in range(0, pages, CHUNK):
            places = chunk + inside
            value = values_of_chunk(
                scores, row_stride, shifts, scale, chunk, pages, HEADS, AT_ONCE, CHUNK
            )
            size, covered = _sizes_of(
                places, length, is_every, ranges, ranges_stride, PAGE_SIZE, RANGES
            )
            number = tl.where(covered < size, order_of(value), 0)  # pages of no key: 0 < 0
            lowest, highest, counted = extremes_of(number, lowest, highest, counted)
            tl.debug_barrier()  # of short rows, several threads load the same scores
            tl.store(memory + places, number.to(tl.int32, bitcast=True), mask=places < pages)
        tl.debug_barrier()  # what one thread has written, another one reads
        bound, room = bound_of(memory, pages, wanted, lowest, highest, counted, CHUNK, False)
        num_whole = tl.zeros_like(length)
        edges = (length,)  # the pages where ranges begin or end, behind what is of no use
        for edge in tl.static_range(2 * RANGES):
            at = tl.load(ranges + edge * ranges_stride) - edge % 2  # the first key, or the last
            page = tl.maximum(tl.minimum(at, length - 1), 0) // PAGE_SIZE
            edges = edges + (page,)  # type: ignore[assignment]  # noqa: RUF005
        for chunk in range(0, pages, CHUNK):
            places = chunk + inside
            own, _ = load_numbers(memory, chunk, pages, CHUNK)
            chosen, room = chosen_of(own, bound, room)
            size, covered = _sizes_of(
                places, length, is_every, ranges, ranges_stride, PAGE_SIZE, RANGES
            )
            # Pages that are listed whole, and tokens of all: two counts in one number.
            is_whole = (chosen | (covered == size)) & (size > 0)
            count = tl.where(is_whole, size, covered).to(PAIR)
            count += is_whole.to(PAIR) << BITS
            before = tl.cumsum(count, 0) - count
            start = total + (before & ((1 << BITS) - 1)).to(tl.int32)
            rank = num_whole + (before >> BITS).to(tl.int32)
            tl.store(tokens + start, places * PAGE_SIZE, mask=is_whole)
            if PAGE_SIZE > 1:
                tl.debug_barrier()  # all threads have read the numbers
                tl.store(memory + rank, start, mask=is_whole)
                # Of pages not listed whole, what is at ends of ranges: two of each, at most.
                for edge in tl.static_range(2 * RANGES):
                    page = edges[edge + 1]
                    if (page >= chunk) & (page < chunk + CHUNK):
                        is_edge = (places == page) & (is_whole == 0)
                        place = tl.sum(tl.where(is_edge, start + 1, 0), 0) - 1
                        if place >= 0:  # else it is listed whole
                            _write_edge(
                                tokens + place,
                                page * PAGE_SIZE,
                                tl.minimum((page + 1) * PAGE_SIZE, length),
                                ranges,
                                ranges_stride,
                                WIDTH,
                                RANGES,
                            )
            all_of_chunk = tl.sum(count, 0)
            total += (all_of_chunk & ((1 << BITS) - 1)).to(tl.int32)
            num_whole += (all_of_chunk >> BITS).to(tl.int32)
        if PAGE_SIZE > 1:
            tl.debug_barrier()  # what one thread has written, another one reads
            _complete_pages(tokens, memory, num_whole, length, PAGE_SIZE, WIDTH, WRITTEN)
        more = total.to(tl.int64)
        tl.atomic_add(reads + index * reads_stride, more * HEADS, sem="relaxed")
        tl.atomic_add(reads + index * reads_stride + 1, more, sem="relaxed")
    tl.store(listed + item, total)


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
        or row_capacity(lists.tokens.shape[1], page_size) < capacity
        or lists.log_weights.shape[1:] != (0, 1)
    ):
        raise ValueError(
            f"lists of {tuple(lists.tokens.shape)} tokens with weights of "
            f"{tuple(lists.log_weights.shape[1:])} cannot hold {num_lists} of {capacity} pages"
        )
    chunks = sizes_of_chunks(capacity, num_heads // kv_heads)
    bits = (chunks["CHUNK"] * page_size).bit_length()
    _list_pages_kernel[(num_lists,)](
        scores,
        lengths,
        counts,
        lengths if every is None else every,
        ranges if num_ranges else lengths,
        lists.tokens,
        lists.counts,
        reads,
        scaling * math.log2(math.e),
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
        WRITTEN=max(1, _TOKENS_AT_ONCE // power_of_2(page_size)),
        BITS=bits,
        PAIR=tl.int32 if bits + chunks["CHUNK"].bit_length() < 32 else tl.int64,
        **chunks,
        **overlapped(scores.device),
    )
