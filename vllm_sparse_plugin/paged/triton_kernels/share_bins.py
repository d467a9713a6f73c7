"""Bins of numbers that stand for shares of attention: few keys in each, one with the last place.

How wide bins must be, nobody knows beforehand: shares differ by a few percent in one row, and by
powers of ten in another. So they are the wider the farther they are from a share that is usual in
the row: above it by a quarter to a seventh of their distance (in octaves, from 1/64 of one on), and
below it by half of it to a third. Some percent of a row's keys are in a bin then, whether scores
are flat or steep, few keys have almost everything or nothing, or the last ones more than others.
(More are where most keys are the same but for some percent, and others are not.)

There are no more bins than 64, because in Triton 3.6 counting takes so many instructions for each
bit of a bin's number.
"""

import triton
import triton.language as tl

BINS = 64
"""The first and the last one are empty: keys that cannot be chosen are in none."""
WORDS = 8
"""Of what is known of a row: the least rank of keys that are listed for sure, and of those that
are chosen from, how many keys of the first kind have a number, the places left for the second kind,
and how many there are; 5: see `radix.is_last`."""
_USUAL, _ABOVE, _BELOW = tl.constexpr(22), tl.constexpr(40), tl.constexpr(21)
"""The bin of usual shares, and how many there are on both sides."""
_DROPPED = tl.constexpr(8)
"""Bits of a distance that are of no consequence; float32s are exact without them."""
_NEAREST = tl.constexpr(136 << 23)
"""What is left of the distance where bins begin on both sides, 2**9, as float32 in int32: 1/64 of
an octave, which is 2**23 numbers."""


@triton.jit
def number_of(share):
    """The number that stands for shares, uint32, see `radix.order_of`: none of them is negative."""
    return share.to(tl.uint32, bitcast=True) | 0x80000000


@triton.jit
def usual_number(share):
    """That of a share that is usual; of whatever is computed from no numbers, one in its range."""
    return tl.minimum(number_of(share), 0xC0000000).to(tl.uint32)


@triton.jit
def digit_of(number, usual):
    """The bin, from 1 on, of a number that stands for a share; see the module.

    Numbers of shares are those of float32s that are not negative: their order is that of exponents,
    and then of what is behind. A distance's own float32 has bins of its own in its first bits.

    Args:
        number: uint32, see `number_of`.
        usual: See `usual_number`.
    """
    away = (number - usual).to(tl.int32, bitcast=True)
    distance = (tl.abs(away) >> _DROPPED).to(tl.float32).to(tl.int32, bitcast=True) - _NEAREST
    above = tl.minimum(tl.maximum((distance >> 21) + 1, 0), _ABOVE)
    below = tl.minimum(tl.maximum((distance >> 22) + 1, 0), _BELOW)
    return tl.where(away >= 0, above, -below) + _USUAL


@triton.jit
def rank_of(number):
    """As numbers rank; above all of them keys without one, which are in the ranges."""
    return number - 1


@triton.jit
def _distance_of(bins, SHIFT: tl.constexpr):
    """Where the bin begins that is so many from the usual one, 1 or more, in numbers."""
    begin = ((bins - 1) << SHIFT) + _NEAREST
    return begin.to(tl.float32, bitcast=True).to(tl.int32) << _DROPPED


@triton.jit
def least_rank(digit, usual):
    """Of the numbers in a bin from 1 on, uint32; behind the last bin, that of keys without one.

    Args:
        digit: int32.
        usual: See `usual_number`.
    """
    above, below = tl.maximum(digit - _USUAL, 1), tl.maximum(1 - (digit - _USUAL), 1)
    least = tl.where(digit > _USUAL, _distance_of(above, 21), 1 - _distance_of(below, 22))
    rank = usual + least.to(tl.uint32, bitcast=True) - 1
    rank = tl.where(digit > 1, rank, 0)
    return tl.where(digit > _USUAL + _ABOVE, 0xFFFFFFFF, rank).to(tl.uint32)


@triton.jit
def divide(
    histograms,
    state,
    places,
    live,
    wanted,
    usual,
    PARTS: tl.constexpr,
    BINS: tl.constexpr,
):
    """What all programs of a row need to know for listing its keys, from their histograms.

    Args:
        histograms: Pointer to the row's, `[PARTS, BINS]`, int32.
        state: Pointer to the row's, see `WORDS`; written.
        places: Pointer to the row's, `[PARTS, 2]`; written: keys of the parts before, above the
            bin that has the last place, and in it.
        live: Parts.
        wanted: How many keys are to be chosen.
        usual: See `usual_number`.
        PARTS: Of a row.
        BINS: See above.
    """
    parts, bins = tl.arange(0, PARTS), tl.arange(0, BINS)
    at = histograms + parts[:, None] * BINS + bins[None, :]
    counts = tl.load(at, mask=(parts < live)[:, None], other=0, cache_modifier=".cg")
    total = tl.sum(counts, 0)
    candidates = tl.sum(tl.where(bins > 0, total, 0), 0)
    wanted = tl.minimum(tl.maximum(wanted, 0), candidates)
    at_least = tl.sum(total, 0) - tl.cumsum(total, 0) + total
    lowest = tl.sum((at_least >= tl.maximum(wanted, 1)).to(tl.int32), 0) - 1
    # If all keys of the last place's bin have one, they are listed like those above.
    reached = tl.sum(tl.where(bins >= lowest, total, 0), 0)
    first = tl.where(wanted == 0, BINS, tl.where(reached == wanted, lowest, lowest + 1))
    above = tl.sum(tl.where(bins[None, :] >= first, counts, 0), 1)
    room = wanted - tl.sum(above, 0)
    rest = tl.where(room > 0, tl.sum(tl.where(bins[None, :] == first - 1, counts, 0), 1), 0)
    tl.store(places + 2 * parts, tl.cumsum(above, 0) - above)
    tl.store(places + 2 * parts + 1, tl.cumsum(rest, 0) - rest)
    tl.store(state, least_rank(first, usual).to(tl.int32, bitcast=True))
    least_open = least_rank(tl.where(room > 0, first - 1, first), usual)
    tl.store(state + 1, least_open.to(tl.int32, bitcast=True))
    tl.store(state + 2, tl.sum(above, 0))
    tl.store(state + 3, room)
    tl.store(state + 4, tl.sum(rest, 0))
