"""Rounding float32 to what a cache's type can hold."""

from __future__ import annotations

import numpy as np
from numba import njit

from vllm_sparse_plugin.paged.kernels.rows import BFLOAT16, FLOAT16

_SMALLEST_NORMAL_HALF = np.float32(2.0**-14)


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def round_to_kind(values: np.ndarray, kind: int) -> None:
    """Rounds to the nearest number of a type, ties to even; in place.

    Args:
        values: float32, within the type's range.
        kind: See `rows`.
    """
    bits = values.view(np.uint32)
    if kind == BFLOAT16:
        for i in range(bits.shape[0]):
            odd = (bits[i] >> np.uint32(16)) & np.uint32(1)
            bits[i] = (bits[i] + np.uint32(0x7FFF) + odd) & np.uint32(0xFFFF0000)
    elif kind == FLOAT16:
        for i in range(bits.shape[0]):
            if abs(values[i]) < _SMALLEST_NORMAL_HALF:
                # Steps of 2**-24 there, as float32 itself has from 0.5 on.
                near = abs(values[i]) + np.float32(0.5) - np.float32(0.5)
                values[i] = near if values[i] > 0 else -near
            else:
                odd = (bits[i] >> np.uint32(13)) & np.uint32(1)
                bits[i] = (bits[i] + np.uint32(0xFFF) + odd) & np.uint32(0xFFFFE000)
