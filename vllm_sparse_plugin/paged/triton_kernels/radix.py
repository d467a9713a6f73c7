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

SPLIT_WARPS = 4
"""Of a program that has a part of a row: sums over all threads, for which they wait for each other,
take little, and several programs of a processor take turns."""
SPLIT_REGISTERS = 64
"""Of a thread, at most: so 8 programs of a part run at once on a processor."""

WORDS = 8
"""Of what is known of a split row: the bound, the places left among its equals, how many there are,
how many numbers are wanted, how many can be chosen; and the programs that have come, see
`is_last`."""

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
def load_numbers(order, first, end, TILE: tl.constexpr):
    """A tile of a row, uint32, and which of its numbers are before the end.

    Args:
        order: Pointer to the row, int32.
        first: Of the tile, a multiple of 16.
        end: See above.
        TILE: See above.
    """
    places = first // 16 * 16 + tl.arange(0, TILE)  # so that Triton knows of the 16
    mask = places < end
    # A mask that differs between neighbours would make each a load of its own.
    if first + TILE <= end:
        own = tl.load(order + places)
    else:
        own = tl.load(order + places, mask=mask, other=0)
    return own.to(tl.uint32, bitcast=True), mask


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
        own, mask = load_numbers(order, first, end, TILE)
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
    """The bound with its first digit: see `add_digit`."""
    room = tl.maximum(wanted, 0)
    start = tl.where(room > 0, 0, 0xFFFFFFFF).to(tl.uint32)
    return add_digit(histogram, start, room, 0, BINS)


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
    bound, room, equal = first_bound(histogram, wanted, BINS)
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
def _share_of(numbers, parts, TILE: tl.constexpr):
    """Numbers of each part of a row, in whole tiles."""
    return tl.cdiv(tl.cdiv(numbers, parts), TILE) * TILE


@triton.jit
def part_of(numbers, part, parts, TILE: tl.constexpr):
    """Begin and end of a part of a row."""
    share = _share_of(numbers, parts, TILE)
    return tl.minimum(part * share, numbers), tl.minimum((part + 1) * share, numbers)


@triton.jit
def live_parts(numbers, parts, TILE: tl.constexpr):
    """How many parts of a row are not empty: the first ones."""
    return tl.cdiv(numbers, _share_of(numbers, parts, TILE))


@triton.jit
def is_last(state, live):
    """Whether all other programs of a row have been here before: each that is live comes once.

    What they did before they came, this one sees. All threads' additions are before the barrier,
    and thus before the one atomic operation of a program, which releases them to the whole GPU. The
    last program's has read what all others' wrote, one after the other, and so acquires; its
    threads learn of that behind a barrier again. (Loads take no line from before out of L1, since
    to acquire empties it; `take_histogram` asks L2 all the same.)
    """
    tl.debug_barrier()
    come = tl.atomic_add(state + 5, 1, sem="acq_rel")
    if come == live - 1:
        tl.store(state + 5, 0)  # for the next launch: nobody else comes
    return come == live - 1


@triton.jit
def take_histogram(histogram, BINS: tl.constexpr):
    """A row's histogram; its memory is 0 afterwards, as the next selection needs it."""
    every = tl.arange(0, BINS)
    found = tl.load(histogram + every, cache_modifier=".cg")
    tl.debug_barrier()  # several threads may load a number that one makes 0
    tl.store(histogram + every, tl.zeros([BINS], tl.int32))
    return found


@triton.jit
def keep_bound(state, bound, room, equal, LEVEL: tl.constexpr):
    """Leaves the bound with a digit for the next launch, see `bound_of_state`."""
    if LEVEL < 3:
        # Where all that equal it so far are chosen, further digits decide nothing.
        is_found = (room > 0) & (room == equal) & (bound > 0)
        bound = tl.where(is_found, bound - 1, bound)
        room = tl.where(is_found, 0, room)
    tl.store(state, bound.to(tl.int32, bitcast=True))
    tl.store(state + 1, room)
    tl.store(state + 2, equal)


@triton.jit
def bound_of_state(state):
    """What the launch before has found of a row.

    Returns:
        The bound; the places left among numbers that equal it, in the digits that are known; and
        how many numbers do. With no place left the bound is final, and all above it are chosen.
    """
    bound = tl.load(state).to(tl.uint32, bitcast=True)
    return bound, tl.load(state + 1), tl.load(state + 2)


@triton.jit
def add_first_digits(
    histogram,
    histograms,
    state,
    live,
    counts,
    index,
    MODE: tl.constexpr,
    SHARE: tl.constexpr,
    KEYS: tl.constexpr,
    BINS: tl.constexpr,
):
    """Adds a part's histogram of first digits to the row's; the last part's program ends it.

    Args:
        histogram: `[BINS]`, int32.
        histograms: Pointer to a row's, `[LEVELS, BINS]`, int32.
        state: Pointer to a row's, `[WORDS]`, int32.
        live: See `live_parts`.
        counts: See `wanted_of`; so the next four.
        index: Of the row's count.
        MODE: See `wanted_of`.
        SHARE: See `wanted_of`.
        KEYS: See `wanted_of`.
        BINS: See above.
    """
    every = tl.arange(0, BINS)
    tl.atomic_add(histograms + every, histogram, mask=histogram > 0, sem="relaxed")
    if is_last(state, live):
        total = take_histogram(histograms, BINS)
        candidates = candidates_of(total, BINS)
        wanted = wanted_of(counts, index, candidates, MODE, SHARE, KEYS)
        bound, room, equal = first_bound(total, wanted, BINS)
        keep_bound(state, bound, room, equal, 0)
        tl.store(state + 3, wanted)
        tl.store(state + 4, candidates)


@launched
def count_kernel(
    order,
    lengths,
    histograms,
    states,
    equals,
    row_stride,
    PAGE_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    HEADS: tl.constexpr,
    LEVEL: tl.constexpr,
    BINS: tl.constexpr,
    TILE: tl.constexpr,
    WORDS: tl.constexpr,
):
    """Finds a row's next digit; of the last one, keeps each part's histogram too.

    Grid: rows, parts. There are `ROWS` rows per query, each `HEADS` rows of memory from the next.
    """
    item, part, parts = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    pages = tl.cdiv(tl.load(lengths + item // ROWS), PAGE_SIZE)
    begin, end = part_of(pages, part, parts, TILE)
    if begin < end:
        state = states + item * WORDS
        bound, room, _ = bound_of_state(state)
        if room > 0:
            every = tl.arange(0, BINS)
            own = histograms + (item * 4 + LEVEL) * BINS
            order += item * HEADS * row_stride
            histogram = tl.zeros([BINS], tl.int32)
            for first in range(begin, end, TILE):
                numbers, mask = load_numbers(order, first, end, TILE)
                mask = mask & ((numbers >> (32 - 8 * LEVEL)) == (bound >> (32 - 8 * LEVEL)))
                digits = ((numbers >> (24 - 8 * LEVEL)) & 255).to(tl.int32)
                found = tl.sum(mask.to(tl.int32), 0)
                # A histogram of a tile takes as long for a few numbers as for all.
                if (LEVEL < 3) & (found <= TILE // 16):
                    if found > 0:
                        ones = tl.full([TILE], 1, tl.int32)
                        tl.atomic_add(own + digits, ones, mask=mask, sem="relaxed")
                elif found > 0:
                    histogram += tl.histogram(digits, BINS, mask=mask)
            tl.atomic_add(own + every, histogram, mask=histogram > 0, sem="relaxed")
            if LEVEL == 3:
                tl.store(equals + (item * parts + part) * BINS + every, histogram)
            if is_last(state, live_parts(pages, parts, TILE)):
                total = take_histogram(own, BINS)
                bound, room, equal = add_digit(total, bound, room, LEVEL, BINS)
                keep_bound(state, bound, room, equal, LEVEL)


@triton.jit
def equals_before(equals, item, part, parts, bound, BINS: tl.constexpr, PARTS: tl.constexpr):
    """How many numbers equal the bound in the parts of a row before one of them."""
    others = tl.arange(0, PARTS)
    places = (item * parts + others) * BINS + (bound & 255).to(tl.int32)
    return tl.sum(tl.load(equals + places, mask=others < part, other=0), 0)
