"""Bins of numbers that stand for shares of attention: few keys in each, one with the last place.

4 bins per octave from four times what each key of a row would have if all had the same down to a
thousandth of it, and 4 octaves in a bin elsewhere. So few keys are in any bin, whether scores are
flat or steep, and if sinks have almost everything: some percent. (More bins would take longer:
Triton 3.6 counts with so many instructions for each bit of a bin's number.)
"""

import triton
import triton.language as tl

from vllm_sparse_plugin.paged.triton_kernels.radix import order_of

BINS = 64
"""The first one is empty: keys that cannot be chosen are in none."""
WORDS = 8
"""Of what is known of a row: the least rank of keys that are listed for sure, and of those that
are chosen from, how many keys of the first kind have a number, the places left for the second kind,
and how many there are; 5: see `radix.is_last`."""
_OCTAVES, _BIN = tl.constexpr(25), tl.constexpr(21)
"""Bits of a float32 behind what makes 4 octaves, and behind what makes 4 bins of an octave."""
_FINE, _COARSE, _FINE_NUMBERS = tl.constexpr(12), tl.constexpr(60), tl.constexpr(12 << 23)
"""The first fine bin, and the first coarse one behind the twelve fine octaves, which have so many
numbers. The bins before are of 44 octaves."""
_LAST = tl.constexpr(BINS - 1)


@triton.jit
def first_fine_of(length):
    """The number of the share that the fine bins begin with: 2**-10 of an equal one, uint32."""
    return order_of(0.0009765625 / length.to(tl.float32))


@triton.jit
def digit_of(number, first_fine):
    """The bin, from 1 on, of a number that stands for a share; see the module.

    Numbers of shares are those of float32s that are not negative: their order is that of exponents,
    and then of what is behind.
    """
    above = (number - first_fine).to(tl.int32, bitcast=True)
    below, fine = tl.minimum(above, 0), tl.minimum(tl.maximum(above, 0), _FINE_NUMBERS)
    behind = tl.maximum(above, _FINE_NUMBERS) - _FINE_NUMBERS
    digit = _FINE + (below >> _OCTAVES) + (fine >> _BIN) + (behind >> _OCTAVES)
    return tl.minimum(tl.maximum(digit, 1), _LAST)


@triton.jit
def rank_of(number):
    """As numbers rank; above all of them keys without one, which are in the ranges."""
    return number - 1


@triton.jit
def _least_rank(digit, first_fine):
    """Of the numbers in a bin from 1 on, uint32; of `BINS`, that of keys without a number."""
    above = tl.where(digit < _FINE, (digit - _FINE) << _OCTAVES, (digit - _FINE) << _BIN)
    behind = _FINE_NUMBERS + ((digit - _COARSE) << _OCTAVES)
    above = tl.where(digit < _COARSE, above, behind)
    least = first_fine + above.to(tl.uint32, bitcast=True) - 1
    return tl.where(digit > _LAST, 0xFFFFFFFF, tl.where(digit > 1, least, 0)).to(tl.uint32)


@triton.jit
def divide(
    histograms,
    state,
    places,
    live,
    wanted,
    first_fine,
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
        first_fine: See `first_fine_of`.
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
    tl.store(state, _least_rank(first, first_fine).to(tl.int32, bitcast=True))
    least_open = _least_rank(tl.where(room > 0, first - 1, first), first_fine)
    tl.store(state + 1, least_open.to(tl.int32, bitcast=True))
    tl.store(state + 2, tl.sum(above, 0))
    tl.store(state + 3, room)
    tl.store(state + 4, tl.sum(rest, 0))
