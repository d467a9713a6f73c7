"""e to the power of float32s, a vector at a time and without a function call."""

from __future__ import annotations

from typing import Any

import numpy as np

from vllm_sparse_plugin.paged.kernels.compiled import compiled
from vllm_sparse_plugin.paged.kernels.vectors import (
    LANES,
    add,
    larger,
    load,
    load_some,
    multiply_add,
    multiply_then_add,
    rounded_down,
    splat,
    store,
    store_some,
    times_power_of_2,
    total,
)

_LOG2_E = np.float32(1.4426950408889634)
# ln 2 in two parts, the first with few bits: n * ln 2 is then exact for small n (Cody and Waite).
_LN2_HIGH = np.float32(0.693359375)
_LN2_LOW = np.float32(-2.12194440e-4)
_LOWEST = np.float32(-87.0)  # e**-87 is the smallest power that is a normal float32
# The polynomial of Cephes' expf: e**rest for |rest| <= ln(2) / 2.
_A = np.float32(1.9875691500e-4)
_B = np.float32(1.3981999507e-3)
_C = np.float32(8.3334519073e-3)
_D = np.float32(4.1665795894e-2)
_E = np.float32(1.6666665459e-1)
_F = np.float32(5.0000001201e-1)


@compiled(inline=True)
def exponential(vector: Any) -> Any:
    """e**x of each lane, none above 80; relative error below 2e-7.

    What is below -87 gives e**-87, which is nothing beside a row's largest value of 1.
    """
    x = larger(vector, splat(_LOWEST))
    power = rounded_down(multiply_add(x, splat(_LOG2_E), splat(np.float32(0.5))))
    rest = multiply_add(power, splat(-_LN2_HIGH), x)
    rest = multiply_add(power, splat(-_LN2_LOW), rest)
    result = multiply_add(splat(_A), rest, splat(_B))
    result = multiply_add(result, rest, splat(_C))
    result = multiply_add(result, rest, splat(_D))
    result = multiply_add(result, rest, splat(_E))
    result = multiply_add(result, rest, splat(_F))
    one_and_rest = add(rest, splat(np.float32(1.0)))
    square = multiply_then_add(rest, rest, splat(np.float32(0.0)))
    return times_power_of_2(multiply_add(result, square, one_and_rest), power)


@compiled()
def exp_in_place(values: np.ndarray, count: int, scale: float, offset: float) -> Any:
    """Replaces the first `count` values x by e**(x * scale - offset), and sums them.

    Args:
        values: float32.
        count: How many.
        scale: See above.
        offset: Such that no exponent is above 80.

    Returns:
        Their sum, float32, in an order that depends on `count` alone.
    """
    factor, shift = splat(np.float32(scale)), splat(np.float32(-offset))
    sums = splat(np.float32(0.0))
    whole = count // LANES * LANES
    for i in range(0, whole, LANES):
        powers = exponential(multiply_then_add(load(values, i, 0), factor, shift))
        store(values, i, powers)
        sums = add(sums, powers)
    if whole < count:
        left = count - whole
        rest = load_some(values, whole, 0, left)
        store_some(values, whole, exponential(multiply_then_add(rest, factor, shift)), left)
        sums = add(sums, load_some(values, whole, 0, left))
    return total(sums)
