"""Selection from rows by one program each, in few launches: for rows that are not very long.

A program goes over its row in chunks, as long as the row is; what it finds out is where its
numbers were, in memory that its processor has at hand. The bound between what is selected and the
rest is sought between the smallest and the largest number: two bounds in between are tried at once,
until as many numbers as are wanted reach one, or nothing is left in between. Of random numbers, a
row of 2048 takes about ten sums over a program's threads. (Histograms of four digits took 15 us on
an H200, for 2048 numbers. Rows in registers were as fast as this for lengths of a power of 2, but a
key more took as long as twice as many: 18 us more in each layer at 32,800 keys.)
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from vllm_sparse_plugin.paged.triton_kernels.grids import launched, power_of_2
from vllm_sparse_plugin.paged.triton_kernels.radix import load_numbers, order_of

MOST_NUMBERS = 16384
"""Of a row: more are selected from by several programs. Counts of them have 16 bits."""
CHUNK, WARPS = 2048, 16
"""Numbers that a program works on at once, and its warps."""
HEADS_AT_ONCE = 4
"""Of a group, that are pooled at once."""


@triton.jit
def _logits_of(scores, row_stride, heads, places, pages, scaling, HEADS: tl.constexpr):
    """Scaled scores `[heads, pages]`, float32; -inf where there is no such head or page."""
    mask = (heads < HEADS)[:, None] & (places < pages)[None, :]
    at = scores + heads[:, None] * row_stride + places[None, :]
    return tl.load(at, mask=mask, other=float("-inf")) * scaling


@triton.jit
def pool_row(
    scores,
    row_stride,
    pages,
    scaling,
    HEADS: tl.constexpr,
    AT_ONCE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Replaces the scores of a group's first head by the mean of its heads' shares, see `pooling`.

    Args:
        scores: Pointer to those of the first head.
        row_stride: From one head's to the next one's.
        pages: Of the row.
        scaling: Of the scores.
        HEADS: Of the group.
        AT_ONCE: Of them.
        CHUNK: Pages at once.
    """
    inside = tl.arange(0, CHUNK)
    for first in tl.static_range(0, HEADS, AT_ONCE):
        heads = first + tl.arange(0, AT_ONCE)
        highest = tl.full([AT_ONCE, CHUNK], float("-inf"), tl.float32)
        for chunk in range(0, pages, CHUNK):
            places = chunk + inside
            logits = _logits_of(scores, row_stride, heads, places, pages, scaling, HEADS)
            highest = tl.maximum(highest, logits)
        peak = tl.max(highest, 1)[:, None]
        peak = tl.where(peak == float("-inf"), 0.0, peak)
        powers = tl.zeros([AT_ONCE, CHUNK], tl.float32)
        for chunk in range(0, pages, CHUNK):
            places = chunk + inside
            logits = _logits_of(scores, row_stride, heads, places, pages, scaling, HEADS)
            powers += tl.exp(logits - peak)
        mass = tl.sum(powers, 1)[:, None] * HEADS
        mass = tl.where(mass > 0, mass, 1.0)
        for chunk in range(0, pages, CHUNK):
            places = chunk + inside
            logits = _logits_of(scores, row_stride, heads, places, pages, scaling, HEADS)
            shares = tl.sum(tl.exp(logits - peak) / mass, 0)
            if first > 0:
                shares += tl.load(scores + places, mask=places < pages, other=0.0)
            tl.debug_barrier()  # the first head's scores have been read by all threads
            tl.store(scores + places, shares, mask=places < pages)
        tl.debug_barrier()  # what one thread has written, another one reads


@triton.jit
def bound_of(numbers, pages, wanted, CHUNK: tl.constexpr, IS_LONG: tl.constexpr):
    """What divides a row's largest numbers from the rest.

    Args:
        numbers: Pointer to the row, int32 that are uint32 in truth; 0 is for what cannot be chosen.
        pages: Of the row.
        wanted: How many are to be chosen.
        CHUNK: Numbers at once.
        IS_LONG: Whether there may be more than `MOST_NUMBERS`.

    Returns:
        The bound, uint32, at least 1: all above it are chosen; and how many of those that equal it,
        the first ones: -1 for all.
    """
    lowest = tl.full([CHUNK], 0xFFFFFFFF, tl.uint32)
    highest = tl.zeros([CHUNK], tl.uint32)
    counts = tl.zeros([CHUNK], tl.int32)
    for chunk in range(0, pages, CHUNK):
        own, _ = load_numbers(numbers, chunk, pages, CHUNK)
        lowest = tl.minimum(lowest, tl.where(own > 0, own, 0xFFFFFFFF).to(tl.uint32))
        highest = tl.maximum(highest, own)
        counts += (own > 0).to(tl.int32)
    reached = tl.sum(counts, 0)
    wanted = tl.minimum(tl.maximum(wanted, 0), reached)
    # Enough numbers reach the bound, and too few the end.
    bound, end = tl.min(lowest, 0), tl.max(highest, 0) + 1
    is_any = wanted > 0
    bound = tl.where(is_any, bound, 0xFFFFFFFF).to(tl.uint32)
    reached = tl.where(is_any, reached, 0)
    while (reached > wanted) & (end - bound > 1):
        step = tl.maximum((end - bound) // 3, 1).to(tl.uint32)
        # Two counts in one number: one sum over all threads takes no longer for that.
        BITS: tl.constexpr = 32 if IS_LONG else 16
        PAIR: tl.constexpr = tl.int64 if IS_LONG else tl.int32
        pairs = tl.zeros([CHUNK], PAIR)
        for chunk in range(0, pages, CHUNK):
            own, _ = load_numbers(numbers, chunk, pages, CHUNK)
            pairs += (own >= bound + step).to(PAIR)
            pairs += (own >= bound + 2 * step).to(PAIR) << BITS
        both = tl.sum(pairs, 0)
        first = (both & ((1 << BITS) - 1)).to(tl.int32)
        second = (both >> BITS).to(tl.int32)
        taken = (first >= wanted).to(tl.uint32) + (second >= wanted).to(tl.uint32)
        reached = tl.where(first >= wanted, first, reached)
        reached = tl.where(second >= wanted, second, reached)
        bound += taken * step
        end = tl.where(taken < 2, bound + step, end)
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
    scaling,
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
        if HEADS > 1:
            pool_row(scores, row_stride, pages, scaling, HEADS, AT_ONCE, CHUNK)
        for chunk in range(0, pages, CHUNK):
            places = chunk + inside
            score = tl.load(scores + places, mask=places < pages, other=0.0)
            is_open = _is_open(flags, stride, places, length, PAGE_SIZE, UNITS, WORD, WORDS, ONES)
            number = tl.where(is_open, order_of(score), 0).to(tl.int32, bitcast=True)
            tl.debug_barrier()  # of short rows, several threads load the same scores
            tl.store(numbers + places, number, mask=places < pages)
        tl.debug_barrier()  # what one thread has written, another one reads
        bound, room = bound_of(numbers, pages, wanted, CHUNK, False)
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
        scaling,
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
    }
