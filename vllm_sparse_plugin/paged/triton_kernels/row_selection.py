"""Selection from rows by one program each, in few launches: for rows that are not very long.

A program goes over its row in chunks, as long as the row is; what it finds out is where its
numbers were, in memory that its processor has at hand. The bound between what is selected and the
rest is sought between the smallest and the largest number: four bounds in between are tried at
once, until as many numbers as are wanted reach one, or nothing is left in between. Of random
shares, a row of 2048 or 8192 takes about five sums over a program's threads. (Histograms of four
digits took 15 us on an H200, for 2048 numbers. Rows in registers were as fast as this for lengths
of a power of 2, but a key more took as long as twice as many: 18 us more in each layer at 32,800
keys.)
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from vllm_sparse_plugin.paged.triton_kernels.grids import launched, power_of_2
from vllm_sparse_plugin.paged.triton_kernels.radix import load_numbers, order_of
from vllm_sparse_plugin.paged.triton_kernels.row_shares import shifts_of_row, values_of_chunk

MOST_NUMBERS = 16384
"""Of a row: more are selected from by several programs. Counts of them have 16 bits."""
CHUNK, WARPS = 2048, 16
"""Numbers that a program works on at once, and its warps."""
_REGISTERS = 64
"""Of a thread, at most: so a processor works on two rows at once, where there are so many."""
HEADS_AT_ONCE = 4
"""Of a group, that are pooled at once."""


@triton.jit
def no_extremes(CHUNK: tl.constexpr):
    """The smallest and the largest of no numbers, and how many can be chosen; see `extremes_of`."""
    lowest = tl.full([CHUNK], 0xFFFFFFFF, tl.uint32)
    return lowest, tl.zeros([CHUNK], tl.uint32), tl.zeros([CHUNK], tl.int32)


@triton.jit
def extremes_of(number, lowest, highest, counts):
    """The same with a chunk's numbers: of each place of a chunk, 0 left out.

    Args:
        number: `[CHUNK]`, uint32.
        lowest: So far; so the next two.
        highest: See above.
        counts: See above.
    """
    lowest = tl.minimum(lowest, tl.where(number > 0, number, 0xFFFFFFFF).to(tl.uint32))
    return lowest, tl.maximum(highest, number), counts + (number > 0).to(tl.int32)


@triton.jit
def extremes_of_row(numbers, pages, CHUNK: tl.constexpr):
    """Those of a whole row, see `extremes_of` and `bound_of`."""
    lowest, highest, counts = no_extremes(CHUNK)
    for chunk in range(0, pages, CHUNK):
        own, _ = load_numbers(numbers, chunk, pages, CHUNK)
        lowest, highest, counts = extremes_of(own, lowest, highest, counts)
    return lowest, highest, counts


@triton.jit
def bound_of(
    numbers, pages, wanted, lowest, highest, counts, CHUNK: tl.constexpr, IS_LONG: tl.constexpr
):
    """What divides a row's largest numbers from the rest.

    Args:
        numbers: Pointer to the row, int32 that are uint32 in truth; 0 is for what cannot be chosen.
        pages: Of the row.
        wanted: How many are to be chosen.
        lowest: See `extremes_of`, of the row; so the next two.
        highest: See above.
        counts: See above.
        CHUNK: Numbers at once.
        IS_LONG: Whether there may be more than `MOST_NUMBERS`.

    Returns:
        The bound, uint32, at least 1: all above it are chosen; and how many of those that equal it,
        the first ones: -1 for all.
    """
    reached = tl.sum(counts, 0)
    wanted = tl.minimum(tl.maximum(wanted, 0), reached)
    # Enough numbers reach the bound, and too few are above the last one.
    bound, last = tl.min(lowest, 0), tl.max(highest, 0)
    is_any = wanted > 0
    bound = tl.where(is_any, bound, 0xFFFFFFFF).to(tl.uint32)
    reached = tl.where(is_any, reached, 0)
    while (reached > wanted) & (last > bound):
        # Never above the last one: behind what computing with no numbers gives, nothing is left.
        between = last - bound
        step = tl.maximum(between // 5, 1).to(tl.uint32)
        second, third = tl.minimum(2 * step, between), tl.minimum(3 * step, between)
        fourth = tl.minimum(4 * step, between)
        # Two counts in one number, and both numbers in one sum, for which all threads wait once.
        BITS: tl.constexpr = 32 if IS_LONG else 16
        PAIR: tl.constexpr = tl.int64 if IS_LONG else tl.int32
        low_pairs, high_pairs = tl.zeros([CHUNK], PAIR), tl.zeros([CHUNK], PAIR)
        for chunk in range(0, pages, CHUNK):
            own, _ = load_numbers(numbers, chunk, pages, CHUNK)
            low_pairs += (own >= bound + step).to(PAIR)
            low_pairs += (own >= bound + second).to(PAIR) << BITS
            high_pairs += (own >= bound + third).to(PAIR)
            high_pairs += (own >= bound + fourth).to(PAIR) << BITS
        low_pair, high_pair = tl.split(tl.sum(tl.join(low_pairs, high_pairs), 0))
        taken = tl.zeros_like(step)
        for place in tl.static_range(4):
            count = (high_pair if place > 1 else low_pair) >> (place % 2 * BITS)
            count = (count & ((1 << BITS) - 1)).to(tl.int32)
            taken += (count >= wanted).to(tl.uint32)
            reached = tl.where(count >= wanted, count, reached)
        last = tl.where(taken < 4, bound + tl.minimum((taken + 1) * step, between) - 1, last)
        bound += tl.minimum(taken * step, between)
    room = tl.full([], -1, tl.int32)
    if reached > wanted:
        counts = tl.zeros([CHUNK], tl.int32)
        for chunk in range(0, pages, CHUNK):
            own, _ = load_numbers(numbers, chunk, pages, CHUNK)
            counts += (own > bound).to(tl.int32)
        room = wanted - tl.sum(counts, 0)
    return bound, room


@triton.jit
def chosen_of(own, bound, room):
    """Which numbers of a chunk are chosen, and the room for equal ones in the next chunks.

    Args:
        own: `[CHUNK]`, uint32.
        bound: See `bound_of`.
        room: For those that equal it from this chunk on; -1: for all.
    """
    chosen = own >= bound
    if room >= 0:
        is_equal = (own == bound).to(tl.int32)
        chosen = (own > bound) | ((is_equal > 0) & (tl.cumsum(is_equal, 0) <= room))
        room = tl.maximum(room - tl.sum(is_equal, 0), 0)
    return chosen, room


@triton.jit
def _is_open(
    flags,
    stride,
    places,
    length,
    PAGE_SIZE: tl.constexpr,
    UNITS: tl.constexpr,
    WORD: tl.constexpr,
    WORDS: tl.constexpr,
    ONES: tl.constexpr,
):
    """Which pages have a key that some unit has not selected, `[CHUNK]`.

    Args:
        flags: Pointer to the flags of the row's first unit, of 0 to 3.
        stride: From one unit's flags to the next one's, a multiple of `WORD`.
        places: `[CHUNK]`, pages.
        length: Keys that the query sees.
        PAGE_SIZE: Keys of a page, a multiple of `WORD`.
        UNITS: Of the row.
        WORD: Flags that are loaded at once.
        WORDS: The type of as many.
        ONES: A word of ones.
    """
    open_words = tl.zeros(places.shape, tl.int32)
    for unit in range(UNITS):
        # One after the other: words of all of a page would take too many registers.
        for word in range(PAGE_SIZE // WORD):
            first = places * PAGE_SIZE + word * WORD
            at = (flags + unit * stride + first).to(tl.pointer_type(WORDS))
            own = tl.load(at, mask=first < length, other=ONES)
            selected = (own | (own >> 1)) & ONES
            if WORD > 1:
                # Behind the length, anything counts as selected.
                seen = tl.minimum(tl.maximum(length - first, 1), WORD)
                behind = tl.full(places.shape, ONES, WORDS) << (8 * (seen % WORD)).to(WORDS)
                selected = tl.where(seen < WORD, selected | behind, selected)
            open_words += (selected != ONES).to(tl.int32)
    return open_words > 0


@triton.jit
def _mark(
    flags,
    stride,
    places,
    chosen,
    length,
    PAGE_SIZE: tl.constexpr,
    UNITS: tl.constexpr,
    WORD: tl.constexpr,
    WORDS: tl.constexpr,
    ONES: tl.constexpr,
):
    """Selects pages for all units, without a key behind the length; see `_is_open`.

    Args:
        flags: See `_is_open`; so all but the next.
        stride: As there.
        places: As there.
        chosen: `[CHUNK]`: which pages.
        length: As there.
        PAGE_SIZE: As there.
        UNITS: As there.
        WORD: As there.
        WORDS: As there.
        ONES: As there.
    """
    inside = tl.arange(0, WORD)
    rest = length // WORD * WORD  # the last word, where it is not a whole one
    is_rest_chosen = tl.sum((chosen & (places == rest // PAGE_SIZE)).to(tl.int32), 0)
    end = tl.where(is_rest_chosen > 0, length, rest)
    for unit in range(UNITS):
        own = flags + unit * stride
        for word in range(PAGE_SIZE // WORD):
            first = places * PAGE_SIZE + word * WORD
            ones = tl.full(places.shape, ONES, WORDS)
            target = (own + first).to(tl.pointer_type(WORDS))
            tl.store(target, ones, mask=chosen & (first + WORD <= length))
        ones_of_rest = tl.full([WORD], 1, tl.uint8)
        tl.store(own + rest + inside, ones_of_rest, mask=rest + inside < end)


@launched
def _select_rows_kernel(
    scores,
    flags,
    lengths,
    counts,
    scale,
    row_stride,
    stride,
    PAGE_SIZE: tl.constexpr,
    SELECTORS: tl.constexpr,
    HEADS: tl.constexpr,
    UNITS: tl.constexpr,
    WORD: tl.constexpr,
    WORDS: tl.constexpr,
    ONES: tl.constexpr,
    AT_ONCE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Grid: rows."""
    item = tl.program_id(0).to(tl.int64)
    index = item // SELECTORS
    length, wanted = tl.load(lengths + index), tl.load(counts + index).to(tl.int32)
    if (length > 0) & (wanted > 0):
        scores += item * HEADS * row_stride
        flags += item * UNITS * stride
        numbers = scores.to(tl.pointer_type(tl.int32))
        pages = tl.cdiv(length, PAGE_SIZE)
        inside = tl.arange(0, CHUNK)
        shifts = (scale,)
        if HEADS > 1:
            shifts = shifts_of_row(scores, row_stride, pages, scale, HEADS, AT_ONCE, CHUNK)
        lowest, highest, counted = no_extremes(CHUNK)
        for chunk in range(0, pages, CHUNK):
            places = chunk + inside
            value = values_of_chunk(
                scores, row_stride, shifts, scale, chunk, pages, HEADS, AT_ONCE, CHUNK
            )
            is_open = _is_open(flags, stride, places, length, PAGE_SIZE, UNITS, WORD, WORDS, ONES)
            number = tl.where(is_open & (places < pages), order_of(value), 0)
            lowest, highest, counted = extremes_of(number, lowest, highest, counted)
            tl.debug_barrier()  # of short rows, several threads load the same scores
            tl.store(numbers + places, number.to(tl.int32, bitcast=True), mask=places < pages)
        tl.debug_barrier()  # what one thread has written, another one reads
        bound, room = bound_of(numbers, pages, wanted, lowest, highest, counted, CHUNK, False)
        for chunk in range(0, pages, CHUNK):
            places = chunk + inside
            own, _ = load_numbers(numbers, chunk, pages, CHUNK)
            chosen, room = chosen_of(own, bound, room)
            _mark(flags, stride, places, chosen, length, PAGE_SIZE, UNITS, WORD, WORDS, ONES)


_WORDS = {1: tl.uint8, 2: tl.uint16, 4: tl.uint32, 8: tl.uint64}


def select_rows(
    scores: torch.Tensor,
    page_size: int,
    selectors: int,
    counts: torch.Tensor,
    scaling: float,
    lengths: torch.Tensor,
    flags: torch.Tensor,
) -> None:
    """See `selection.flag_largest`.

    Args:
        scores: See there, of at most `MOST_NUMBERS` pages; so all others.
        page_size: As there.
        selectors: As there.
        counts: As there.
        scaling: As there.
        lengths: As there.
        flags: As there.
    """
    num_queries, num_heads, capacity = scores.shape
    items, stride = num_queries * selectors, flags.shape[1]
    word = math.gcd(8, page_size, stride)
    heads = num_heads // selectors
    _select_rows_kernel[(items,)](
        scores,
        flags,
        lengths,
        counts,
        scaling * math.log2(math.e),
        capacity,
        stride,
        PAGE_SIZE=page_size,
        SELECTORS=selectors,
        HEADS=heads,
        UNITS=len(flags) // items,
        WORD=word,
        WORDS=_WORDS[word],
        ONES=int.from_bytes(bytes([1] * word), "little"),
        **sizes_of_chunks(capacity, heads),
    )


def row_capacity(keys: int, page_size: int) -> int:
    """Pages of a row of scores: a multiple of 16, for rows to begin where loads are wide.

    Args:
        keys: Of the longest row.
        page_size: Keys of a page.
    """
    return -(-keys // (16 * page_size)) * 16


def sizes_of_chunks(capacity: int, heads: int) -> dict[str, int]:
    """How much programs do at once, for their launch.

    Args:
        capacity: Of a row.
        heads: Of a group.
    """
    return {
        "AT_ONCE": min(HEADS_AT_ONCE, power_of_2(heads)),
        "CHUNK": max(128, min(CHUNK, power_of_2(capacity))),
        "num_warps": WARPS,
        "maxnreg": _REGISTERS,
    }
