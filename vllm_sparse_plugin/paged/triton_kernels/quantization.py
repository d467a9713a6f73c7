"""Codes of a few bits for the numbers of a row, as `pseudo_quantize` makes them."""

from __future__ import annotations

import triton
import triton.language as tl

_INTEGERS = tl.constexpr(8388608.0)
"""2**23, where float32s are integers: adding it rounds to the nearest one, ties to even."""


@triton.jit
def extremes_of(values, inside):
    """The smallest and the largest of each row's values, two `[rows, 1, 1]`, float32.

    Args:
        values: `[rows, parts, columns]`, float32.
        inside: Which of them count; at least one of each row. Of as many axes.
    """
    low = tl.min(tl.min(tl.where(inside, values, float("inf")), axis=2), axis=1)
    high = tl.max(tl.max(tl.where(inside, values, float("-inf")), axis=2), axis=1)
    return low[:, None, None], high[:, None, None]


@triton.jit
def step_between(low, high, BITS: tl.constexpr):
    """The step between the codes of rows, `[rows, 1, 1]`, float32.

    Args:
        low: See `extremes_of`.
        high: As there.
        BITS: Of a code.
    """
    levels = tl.zeros_like(low) + ((1 << BITS) - 1)
    return tl.where(high > low, tl.div_rn(high - low, levels), 1.0)


@triton.jit
def smallest_and_step(values, inside, BITS: tl.constexpr):
    """The smallest of each row's values, and the step between its codes; see both above."""
    low, high = extremes_of(values, inside)
    return low, step_between(low, high, BITS)


@triton.jit
def codes_of(values, low, step, BITS: tl.constexpr):
    """Codes, as float32, of values that are not less than `low`; others get any."""
    ratio = tl.div_rn(values - low, tl.zeros_like(values) + step)
    codes = (tl.minimum(tl.maximum(ratio, 0.0), 65535.0) + _INTEGERS) - _INTEGERS
    return tl.minimum(codes, (1 << BITS) - 1.0)
