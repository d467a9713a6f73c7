"""e to the power of a row of float32, without a function call per element.

Compilers turn it into vector instructions, which they cannot do with the library's `exp`.
"""

from __future__ import annotations

import numpy as np
from numba import njit

_LOG2_E = np.float32(1.4426950408889634)
# ln 2 in two parts, the first with few bits: n * ln 2 is then exact for small n (Cody and Waite).
_LN2_HIGH = np.float32(0.693359375)
_LN2_LOW = np.float32(-2.12194440e-4)
_LOWEST = np.float32(-87.0)  # e**-87 is the smallest power that is a normal float32


# No reassociation: it would join the two parts of ln 2 again.
@njit(fastmath={"contract", "nnan", "ninf", "nsz"}, cache=True)  # type: ignore[untyped-decorator]
def exp_in_place(values: np.ndarray, powers: np.ndarray, count: int) -> None:
    """Replaces the first `count` values, none above 80, by e**value; relative error below 2e-7.

    Values below -87 give e**-87, which is nothing beside a row's largest value of 1.

    Args:
        values: float32.
        powers: int32, as long; overwritten.
        count: How many.
    """
    scale = powers.view(np.float32)
    for i in range(count):
        value = max(values[i], _LOWEST)
        power = np.floor(value * _LOG2_E + np.float32(0.5))
        rest = value - power * _LN2_HIGH
        rest = rest - power * _LN2_LOW
        # The polynomial of Cephes' expf: e**rest for |rest| <= ln(2) / 2.
        result = np.float32(1.9875691500e-4)
        result = result * rest + np.float32(1.3981999507e-3)
        result = result * rest + np.float32(8.3334519073e-3)
        result = result * rest + np.float32(4.1665795894e-2)
        result = result * rest + np.float32(1.6666665459e-1)
        result = result * rest + np.float32(5.0000001201e-1)
        values[i] = result * rest * rest + rest + np.float32(1.0)
        powers[i] = (np.int32(power) + np.int32(127)) << np.int32(23)
    for i in range(count):
        values[i] *= scale[i]
