"""Selection from rows that fit into the registers of one program: nothing of them is stored.

The bound between what is selected and the rest is sought between the smallest and the largest
number: two bounds in between are tried at once, until as many numbers as are wanted reach one, or
nothing is left in between. Of random numbers, a row of 2048 takes about ten sums over a program's
threads. (Histograms of four digits took 15 us on an H200, for 2048 numbers.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from vllm_sparse_plugin.paged.triton_kernels.grids import launched, power_of_2
from vllm_sparse_plugin.paged.triton_kernels.radix import order_of

MOST_NUMBERS = 16384
"""Of a row: 32 in each of a program's threads. Counts of them have 16 bits."""
_NUMBERS_PER_THREAD = 16
_FEWEST_WARPS, _MOST_WARPS = 8, 16
_SCORES_AT_ONCE = 16384
"""That a program pools: 32 in each of 512 threads."""


@triton.jit
def pooled_shares(
    scores,
    row_stride,
    places,
    pages,
    scaling,
    HEADS: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """The mean of a group's shares, see `pooling`, `[numbers]`, float32."""
    shares = tl.zeros(places.shape, tl.float32)
    for first in tl.static_range(0, HEADS, AT_ONCE):
        heads = first + tl.arange(0, AT_ONCE)[:, None]
        mask = (heads < HEADS) & (places < pages)[None, :]
        own = tl.load(scores + heads * row_stride + places[None, :], mask=mask, other=float("-inf"))
        logits = own * scaling
        peak = tl.max(logits, 1)[:, None]
        powers = tl.exp(logits - tl.where(peak == float("-inf"), 0.0, peak))
        mass = tl.sum(powers, 1)[:, None] * HEADS
        shares += tl.sum(powers / tl.where(mass > 0, mass, 1.0), 0)
    return shares


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
    """Which pages have a key that some unit has not selected, `[numbers]`.

    Args:
        flags: Pointer to the flags of the row's first unit, of 0 to 3.
        stride: From one unit's flags to the next one's, a multiple of `WORD`.
        places: `[numbers]`, pages.
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
def _reach(numbers, bound, step):
    """How many numbers reach each of two bounds, a step from each other, above one."""
    # Two counts of 16 bits: one sum over all threads takes no longer for that.
    counts = (numbers >= bound + step).to(tl.int32)
    counts += (numbers >= bound + 2 * step).to(tl.int32) << 16
    counts = tl.sum(counts, 0)
    return counts & 0xFFFF, counts >> 16


@triton.jit
def _bound_of(numbers, wanted):
    """What divides the largest numbers from the rest.

    Args:
        numbers: `[numbers]`, uint32; 0 is for what cannot be chosen.
        wanted: How many are to be chosen, at least 1.

    Returns:
        A bound that enough numbers reach, uint32, at least 1; how many reach it; and how many of
        those are to be chosen: where there are fewer than wanted, all. Where more than that reach
        it, it is the largest bound that enough reach.
    """
    reached = tl.sum((numbers > 0).to(tl.int32), 0)
    wanted = tl.minimum(wanted, reached)
    # Enough numbers reach the bound, and too few the end.
    bound = tl.min(tl.where(numbers > 0, numbers, 0xFFFFFFFF).to(tl.uint32), 0)
    end = tl.max(numbers, 0) + 1
    while (reached > wanted) & (end - bound > 1):
        step = tl.maximum((end - bound) // 3, 1).to(tl.uint32)
        first, second = _reach(numbers, bound, step)
        taken = (first >= wanted).to(tl.uint32) + (second >= wanted).to(tl.uint32)
        reached = tl.where(first >= wanted, first, reached)
        reached = tl.where(second >= wanted, second, reached)
        bound += taken * step
        end = tl.where(taken < 2, bound + step, end)
    return bound, reached, wanted


@triton.jit
def largest_of(numbers, wanted):
    """Which numbers are chosen: the largest ones, of equal ones the first.

    Args:
        numbers: `[numbers]`, uint32; 0 is for what cannot be chosen.
        wanted: How many are to be chosen, at least 1.

    Returns:
        `[numbers]`.
    """
    bound, reached, wanted = _bound_of(numbers, wanted)
    chosen = numbers >= bound
    if reached > wanted:
        is_equal = (numbers == bound).to(tl.int32)
        room = wanted - reached + tl.sum(is_equal, 0)
        is_first = (is_equal > 0) & (tl.cumsum(is_equal, 0) <= room)
        chosen = (numbers > bound) | is_first
    return chosen


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
        chosen: `[numbers]`: which pages.
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


@triton.jit
def _select_row(
    scores,
    flags,
    length,
    wanted,
    scaling,
    row_stride,
    stride,
    PAGE_SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    UNITS: tl.constexpr,
    WORD: tl.constexpr,
    WORDS: tl.constexpr,
    ONES: tl.constexpr,
    NUMBERS: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """One row's selection; see `_select_rows_kernel`, and `_is_open`."""
    pages = tl.cdiv(length, PAGE_SIZE)
    places = tl.arange(0, NUMBERS)
    if HEADS > 1:
        own = pooled_shares(scores, row_stride, places, pages, scaling, HEADS, AT_ONCE)
    else:
        own = tl.load(scores + places, mask=places < pages, other=0.0)
    is_open = _is_open(flags, stride, places, length, PAGE_SIZE, UNITS, WORD, WORDS, ONES)
    numbers = tl.where(is_open & (places < pages), order_of(own), 0).to(tl.uint32)
    chosen = largest_of(numbers, wanted)
    _mark(flags, stride, places, chosen, length, PAGE_SIZE, UNITS, WORD, WORDS, ONES)


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
    NUMBERS: tl.constexpr,
    FEWER: tl.constexpr,
    HEADS_AT_ONCE: tl.constexpr,
    MORE_HEADS: tl.constexpr,
):
    """Grid: rows. A row of up to `FEWER` numbers takes as much less time than one of `NUMBERS`."""
    item = tl.program_id(0).to(tl.int64)
    index = item // SELECTORS
    length, wanted = tl.load(lengths + index), tl.load(counts + index).to(tl.int32)
    if (length > 0) & (wanted > 0):
        scores += item * HEADS * row_stride
        flags += item * UNITS * stride
        if length <= FEWER * PAGE_SIZE:
            _select_row(
                scores,
                flags,
                length,
                wanted,
                scaling,
                row_stride,
                stride,
                PAGE_SIZE,
                HEADS,
                UNITS,
                WORD,
                WORDS,
                ONES,
                FEWER,
                MORE_HEADS,
            )
        else:
            _select_row(
                scores,
                flags,
                length,
                wanted,
                scaling,
                row_stride,
                stride,
                PAGE_SIZE,
                HEADS,
                UNITS,
                WORD,
                WORDS,
                ONES,
                NUMBERS,
                HEADS_AT_ONCE,
            )


_WORDS = {1: tl.uint8, 2: tl.uint16, 4: tl.uint32, 8: tl.uint64}


@dataclass(frozen=True)
class RowSizes:
    """Of the programs that select from rows of some capacity; powers of 2.

    Attributes:
        numbers: Of a row.
        fewer: Rows of at most so many take less time.
        heads: Of a group, whose scores are in a program's registers together.
        more_heads: The same, for fewer numbers.
        warps: Of a program.
    """

    numbers: int
    fewer: int
    heads: int
    more_heads: int
    warps: int

    @classmethod
    def of(cls, capacity: int, heads: int) -> RowSizes:
        """For rows of so many numbers.

        Args:
            capacity: At most `MOST_NUMBERS`.
            heads: Of a group.
        """
        numbers = max(128, power_of_2(capacity))
        fewer = max(128, numbers // 4)
        at_once, more = (
            min(power_of_2(heads), max(1, _SCORES_AT_ONCE // size)) for size in (numbers, fewer)
        )
        warps = numbers // (32 * _NUMBERS_PER_THREAD)
        return cls(numbers, fewer, at_once, more, max(_FEWEST_WARPS, min(_MOST_WARPS, warps)))


def select_rows(
    scores: torch.Tensor,
    page_size: int,
    selectors: int,
    counts: torch.Tensor,
    scaling: float,
    lengths: torch.Tensor,
    flags: torch.Tensor,
) -> None:
    """See `selection.flag_largest`; scores are left as they are.

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
    sizes = RowSizes.of(capacity, heads)
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
        NUMBERS=sizes.numbers,
        FEWER=sizes.fewer,
        HEADS_AT_ONCE=sizes.heads,
        MORE_HEADS=sizes.more_heads,
        num_warps=sizes.warps,
    )
