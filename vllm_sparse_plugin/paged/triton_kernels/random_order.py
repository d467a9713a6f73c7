"""Samples without replacement: of a unit's unselected keys, those with the smallest numbers.

Numbers have 53 bits, and a radix selection (`radix`) ranks the highest 31 of them: one more bit
would leave no place for "selected already". Where keys that are equal in these are on both sides of
the bound, once in some ten thousand long rows, the bound is found among them by their whole numbers
and positions.
"""

import triton
import triton.language as tl

from vllm_sparse_plugin.paged.triton_kernels.counter_random import number_of

BASE_FLAG = 4
"""The flag of a base sample's keys while the rest of the sample is not known."""


@triton.jit
def order_numbers(order, flags, begin, end, stream, TILE: tl.constexpr):
    """Writes numbers that rank as random ones do, smallest first; 0 for selected keys.

    Args:
        order: Pointer to a row, int32; written.
        flags: Pointer to the unit's flags.
        begin: First key.
        end: The one after the last.
        stream: Of the query's numbers, see `counter_random`.
        TILE: Keys at once.
    """
    for first in range(begin, end, TILE):
        keys = first + tl.arange(0, TILE)
        mask = keys < end
        is_open = tl.load(flags + keys, mask=mask, other=1) == 0
        number = 0xFFFFFFFF - (number_of(stream, keys) >> 22)
        number = tl.where(is_open, number, 0).to(tl.uint32)
        tl.store(order + keys, number.to(tl.int32, bitcast=True), mask=mask)


@triton.jit
def last_of_equals(order, length, stream, bound, room, equal, TILE: tl.constexpr):
    """The last key to choose among those that equal a bound, by its whole number and position.

    Args:
        order: Pointer to a row, int32.
        length: Of the row.
        stream: Of the query's numbers.
        bound: uint32.
        room: How many of them are chosen.
        equal: How many there are.
        TILE: Keys at once.

    Returns:
        Number and position, both int64: larger than any where all are chosen, -1 where none is.
    """
    last = tl.where(room > 0, tl.full([], 1 << 60, tl.int64), -1)
    place = last
    if room < equal:
        last = tl.full([], -1, tl.int64)
        place = tl.full([], -1, tl.int64)
        for _turn in range(room):
            best = tl.full([], 1 << 60, tl.int64)
            best_place = tl.full([], 1 << 60, tl.int64)
            for first in range(0, length, TILE):
                keys = first + tl.arange(0, TILE)
                own = tl.load(order + keys, mask=keys < length, other=0)
                number = number_of(stream, keys)
                is_later = (number > last) | ((number == last) & (keys > place))
                is_open = (own.to(tl.uint32, bitcast=True) == bound) & is_later & (keys < length)
                number = tl.where(is_open, number, 1 << 60)
                least = tl.min(number, 0)
                found = tl.min(tl.where(number == least, keys, 1 << 30), 0)
                is_better = least < best  # not the equal ones of later tiles
                best_place = tl.where(is_better, found.to(tl.int64), best_place)
                best = tl.where(is_better, least, best)
            last = best
            place = best_place
    return last, place


@triton.jit
def mark_numbers(
    order, flags, begin, end, stream, bound, last, place, FLAG: tl.constexpr, TILE: tl.constexpr
):
    """Flags the keys above a bound, and those that equal it up to the last one.

    Args:
        order: Pointer to a row, int32.
        flags: Pointer to the unit's flags; written.
        begin: First key.
        end: The one after the last.
        stream: Of the query's numbers.
        bound: uint32.
        last: See `last_of_equals`; negative: no key equal to the bound is flagged.
        place: Likewise.
        FLAG: Of the chosen keys, but for those of a base sample, which get 1.
        TILE: Keys at once.
    """
    for first in range(begin, end, TILE):
        keys = first + tl.arange(0, TILE)
        mask = keys < end
        own = tl.load(order + keys, mask=mask, other=0).to(tl.uint32, bitcast=True)
        is_equal = own == bound
        if tl.max(is_equal.to(tl.int32), 0) > 0:
            number = number_of(stream, keys)
            is_equal = is_equal & ((number < last) | ((number == last) & (keys <= place)))
        chosen = ((own > bound) | is_equal) & mask
        before = tl.load(flags + keys, mask=chosen, other=0)
        flag = tl.where(before == 4, 1, FLAG).to(tl.uint8)
        tl.store(flags + keys, flag, mask=chosen)
