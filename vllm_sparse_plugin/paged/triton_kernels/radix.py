"""Radix selection: the place in a row that divides its largest numbers from the rest.

Numbers are uint32, and rank as what they stand for; 0 is for what cannot be chosen. The bound is
found digit by digit, from histograms, by one program per row, or by several that add up their
histograms of the row's parts.

Four digits of a byte: Triton 3.6 counts by ballots, one for each bit of a digit, and then looks at
their results once for every 32 bins. For three longer digits that would be six times as often, and
would take all registers.
"""

import triton
import triton.language as tl

from vllm_sparse_plugin.paged.triton_kernels.grids import launched

BINS = 256
"""Of a histogram: the values of a digit."""

LEVELS = 4
"""Digits of a number, from the highest, which is level 0."""

TILE = 2048
"""Numbers that a program counts at once."""

GIVEN, SHARE, BASE = 0, 1, 2
"""How many are wanted, see `wanted_of`."""


@triton.jit
def order_of(scores):
    """Numbers that rank as their scores do: float32 without NaN as uint32, none of them 0."""
    bits = scores.to(tl.uint32, bitcast=True)
    bits = tl.where(bits == 0x80000000, 0, bits)  # -0.0 equals 0.0
    # By XOR: the interpreter of Triton 3.6 cannot invert unsigned numbers.
    return tl.where(bits >= 0x80000000, bits ^ 0xFFFFFFFF, bits | 0x80000000)


@triton.jit
def score_of(order):
    """The scores that `order_of` made numbers of."""
    bits = tl.where(order >= 0x80000000, order ^ 0x80000000, order ^ 0xFFFFFFFF)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def count_digits(
    order, begin, end, bound, LEVEL: tl.constexpr, BINS: tl.constexpr, TILE: tl.constexpr
):
    """How often each digit occurs among numbers whose higher digits are those of a bound.

    Args:
        order: Pointer to a row, int32 that are uint32 in truth.
        begin: First number.
        end: The one after the last.
        bound: Zero in this digit and below.
        LEVEL: Of the digit.
        BINS: See above.
        TILE: See above.

    Returns:
        `[BINS]`, int32.
    """
    histogram = tl.zeros([BINS], tl.int32)
    for first in range(begin, end, TILE):
        places = first + tl.arange(0, TILE)
        mask = places < end
        own = tl.load(order + places, mask=mask, other=0).to(tl.uint32, bitcast=True)
        if LEVEL > 0:
            mask = mask & ((own >> (32 - 8 * LEVEL)) == (bound >> (32 - 8 * LEVEL)))
        digits = (own >> (24 - 8 * LEVEL)) & 255
        histogram += tl.histogram(digits.to(tl.int32), BINS, mask=mask)
    return histogram


@triton.jit
def add_digit(histogram, bound, room, LEVEL: tl.constexpr, BINS: tl.constexpr):
    """The bound with its next digit.

    Args:
        histogram: `[BINS]`, int32.
        bound: uint32, so far.
        room: Places left among the numbers that equal the bound so far; 0: nothing changes.
        LEVEL: Of the digit.
        BINS: See above.

    Returns:
        The bound, the places left among numbers that equal it, and how many such numbers there
        are. With fewer numbers than places, the digit is 0; and with fewer candidates than wanted,
        the whole bound is, with no place: all that are above are meant.
    """
    every = tl.arange(0, BINS)
    # How many numbers have this digit or a higher one: falls from digit to digit.
    at_least = tl.sum(histogram, 0) - tl.cumsum(histogram, 0) + histogram
    digit = tl.maximum(tl.sum((at_least >= room).to(tl.int32), 0) - 1, 0)
    above = tl.sum(tl.where(every > digit, histogram, 0), 0)
    equal = tl.sum(tl.where(every == digit, histogram, 0), 0)
    is_open = room > 0
    equal = tl.where(is_open, equal, 0)
    left = tl.where(is_open, room - above, 0)
    bound = tl.where(is_open, bound | (digit.to(tl.uint32) << (24 - 8 * LEVEL)), bound)
    if LEVEL == 3:
        left = tl.where(bound == 0, 0, left)
    return bound, left, equal


@triton.jit
def first_bound(histogram, wanted, BINS: tl.constexpr):
    """The bound with its first digit: see `add_digit`, without the number of equals."""
    room = tl.maximum(wanted, 0)
    start = tl.where(room > 0, 0, 0xFFFFFFFF).to(tl.uint32)
    bound, left, _ = add_digit(histogram, start, room, 0, BINS)
    return bound, left


@triton.jit
def bound_of_row(order, length, histogram, wanted, BINS: tl.constexpr, TILE: tl.constexpr):
    """The whole bound of a row, by one program.

    Args:
        order: Pointer to the row.
        length: Of the row.
        histogram: Of its first digits.
        wanted: How many are to be chosen.
        BINS: See above.
        TILE: See above.

    Returns:
        See `add_digit`.
    """
    bound, room = first_bound(histogram, wanted, BINS)
    equal = room
    for level in tl.static_range(1, 4):
        histogram = count_digits(order, 0, length, bound, level, BINS, TILE)
        bound, room, equal = add_digit(histogram, bound, room, level, BINS)
    return bound, room, equal


@triton.jit
def candidates_of(histogram, BINS: tl.constexpr):
    """How many numbers of a row can be chosen, from the histogram of the first digits.

    Only for rows whose numbers are 0, or have a first digit that is not.
    """
    return tl.sum(tl.where(tl.arange(0, BINS) > 0, histogram, 0), 0)


@triton.jit
def wanted_of(
    counts, index, candidates, MODE: tl.constexpr, SHARE: tl.constexpr, KEYS: tl.constexpr
):
    """How many are to be chosen of a row.

    Args:
        counts: Pointer; for `GIVEN`, where it stands.
        index: Of the row's count.
        candidates: How many can be chosen.
        MODE: `GIVEN`; `SHARE`: a share of the candidates, at least 1; `BASE`: a number of keys, or
            a share of the candidates, at least 2.
        SHARE: The share, 0 where there is none.
        KEYS: The number, 0 where there is none.
    """
    if MODE == 0:
        wanted = tl.load(counts + index).to(tl.int32)
    else:
        # In float64 as on the host: in float32 a share of a long row would be another number.
        part = (candidates.to(tl.float64) * tl.full([], SHARE, tl.float64)).to(tl.int32)
        if MODE == 1:
            wanted = tl.maximum(part, 1)
        elif KEYS > 0:
            wanted = tl.full([], KEYS, tl.int32)
        else:
            wanted = tl.maximum(part, 2)
        wanted = tl.minimum(wanted, candidates)
    return wanted


@triton.jit
def part_of(numbers, part, parts, TILE: tl.constexpr):
    """Begin and end of a part of a row, in whole tiles."""
    share = tl.cdiv(tl.cdiv(numbers, parts), TILE) * TILE
    return tl.minimum(part * share, numbers), tl.minimum((part + 1) * share, numbers)


@triton.jit
def bound_before(
    histograms,
    counts,
    index,
    LEVEL: tl.constexpr,
    MODE: tl.constexpr,
    SHARE: tl.constexpr,
    KEYS: tl.constexpr,
    BINS: tl.constexpr,
):
    """The bound before a digit is known, from the histograms of the digits above it.

    Args:
        histograms: Pointer to a row's, `[LEVELS, BINS]`, int32.
        counts: See `wanted_of`; so the next five.
        index: Of the row's count.
        LEVEL: Of the digit, from 1; or `LEVELS` for the whole bound.
        MODE: See `wanted_of`.
        SHARE: See `wanted_of`.
        KEYS: See `wanted_of`.
        BINS: See above.

    Returns:
        The bound; the places left among numbers that equal it; how many numbers do; and how many
        are wanted.
    """
    every = tl.arange(0, BINS)
    histogram = tl.load(histograms + every)
    wanted = wanted_of(counts, index, candidates_of(histogram, BINS), MODE, SHARE, KEYS)
    bound, room = first_bound(histogram, wanted, BINS)
    equal = room
    for level in tl.static_range(1, LEVEL):
        histogram = tl.load(histograms + level * BINS + every)
        bound, room, equal = add_digit(histogram, bound, room, level, BINS)
    return bound, room, equal, wanted


@launched
def count_kernel(
    order,
    lengths,
    counts,
    histograms,
    equals,
    row_stride,
    PAGE_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    HEADS: tl.constexpr,
    COUNTS: tl.constexpr,
    LEVEL: tl.constexpr,
    MODE: tl.constexpr,
    SHARE: tl.constexpr,
    KEYS: tl.constexpr,
    BINS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Adds a part's histogram of a digit to the row's; of the last one, keeps it too.

    Grid: rows, parts. There are `ROWS` rows per query, each `HEADS` rows of memory from the next,
    and a count for each `COUNTS` of them.
    """
    item, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    pages = tl.cdiv(tl.load(lengths + item // ROWS), PAGE_SIZE)
    begin, end = part_of(pages, part, tl.num_programs(1), TILE)
    every = tl.arange(0, BINS)
    own = histograms + item * 4 * BINS
    histogram = tl.zeros([BINS], tl.int32)
    if begin < end:
        bound, room, _, _ = bound_before(
            own, counts, item // COUNTS, LEVEL, MODE, SHARE, KEYS, BINS
        )
        if room > 0:
            order += item * HEADS * row_stride
            histogram = count_digits(order, begin, end, bound, LEVEL, BINS, TILE)
            tl.atomic_add(own + LEVEL * BINS + every, histogram, mask=histogram > 0, sem="relaxed")
    if LEVEL == 3:
        tl.store(equals + (item * tl.num_programs(1) + part) * BINS + every, histogram)


@triton.jit
def equals_before(equals, item, part, parts, bound, BINS: tl.constexpr, PARTS: tl.constexpr):
    """How many numbers equal the bound in the parts of a row before one of them."""
    others = tl.arange(0, PARTS)
    places = (item * parts + others) * BINS + (bound & 255).to(tl.int32)
    return tl.sum(tl.load(equals + places, mask=others < part, other=0), 0)
