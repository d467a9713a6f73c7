"""Codes of a few bits for the numbers of a row, as `pseudo_quantize` makes them."""

from __future__ import annotations

import triton
import triton.language as tl

_INTEGERS = tl.constexpr(8388608.0)
"""2**23, where float32s are integers: adding it rounds to the nearest one, ties to even."""


@triton.jit
def smallest_and_step(values, inside, BITS: tl.constexpr):
    """The smallest of each row's values, and the step between its codes.

    Args:
        values: `[rows, parts, columns]`, float32.
        inside: Which of them count; at least one of each row. Of as many axes.
        BITS: Of a code.

    Returns:
        Two `[rows, 1, 1]`, float32.
    """
    low = tl.min(tl.min(tl.where(inside, values, float("inf")), axis=2), axis=1)
    high = tl.max(tl.max(tl.where(inside, values, float("-inf")), axis=2), axis=1)
    levels = tl.zeros_like(low) + ((1 << BITS) - 1)
    step = tl.where(high > low, tl.div_rn(high - low, levels), 1.0)
    return low[:, None, None], step[:, None, None]


@triton.jit
def codes_of(values, low, step, BITS: tl.constexpr):
    """Codes, as float32, of values that are not less than `low`; others get any."""
    ratio = tl.div_rn(values - low, tl.zeros_like(values) + step)
    codes = (tl.minimum(tl.maximum(ratio, 0.0), 65535.0) + _INTEGERS) - _INTEGERS
    return tl.minimum(codes, (1 << BITS) - 1.0)


@triton.jit
def round_to(values, KIND: tl.constexpr):
    """float32s as the nearest numbers of a type, ties to even; they stay float32.

    Args:
        values: float32, within the type's range.
        KIND: tl.float32, tl.bfloat16 or tl.float16.
    """
    if KIND == tl.bfloat16:  # noqa: SIM300
        # By integers: Triton's interpreter cuts off instead of rounding.
        bits = values.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        return bits.to(tl.float32, bitcast=True)
    return values.to(KIND).to(tl.float32)
