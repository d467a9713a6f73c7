"""Ranges of keys that a query reads whatever their scores, and what they cover of a row."""

import triton
import triton.language as tl

MOST_RANGES = 2
"""What the union of more covers is not computed here."""


@triton.jit
def _overlap(first, end, begin, stop):
    """How many keys two ranges have in common."""
    return tl.maximum(tl.minimum(end, stop) - tl.maximum(first, begin), 0)


@triton.jit
def count_covered(first, end, ranges, stride, RANGES: tl.constexpr):
    """How many keys of [first, end) are in one of the ranges.

    Args:
        first: int32, of any shape.
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
def in_ranges(keys, is_every, ranges, stride, RANGES: tl.constexpr):
    """Which keys are in one of the ranges, or all of them; see `count_covered`.

    Args:
        keys: `[keys]`, int32.
        is_every: Whether all are.
        ranges: See `count_covered`; so the last two.
        stride: As there.
        RANGES: As there.
    """
    found = keys < tl.where(is_every, 0x7FFFFFFF, 0)
    for place in tl.static_range(RANGES):
        own = ranges + 2 * place * stride
        found |= (keys >= tl.load(own)) & (keys < tl.load(own + stride))
    return found
