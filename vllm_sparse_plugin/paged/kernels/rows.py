"""Rows of a cache as float32, whatever the cache's type."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types
from numba.extending import overload

from vllm_sparse_plugin.paged.kernels.compiled import compiled

FLOAT32, BFLOAT16, FLOAT16, E4M3 = range(4)
"""The `kind` of a cache's elements; the last one has 8 bits (Micikevicius et al. 2022, "FP8 Formats
for Deep Learning")."""

_BYTES = np.arange(256, dtype=np.uint16)
E4M3_NUMBERS = ((_BYTES & 0x80) << 8 | (_BYTES & 0x7F) << 7).view(np.float16).astype(
    np.float32
) * 256
"""Of each byte: a float16 of the same sign and exponent is 2**8 times less. (What is no number,
0x7F and 0xFF, is +-480 here.)"""


@compiled()
def first_key(
    elements: np.ndarray, block: int, head: int, block_size: int, head_size: int
) -> np.int64:
    """Where a block's keys of a KV head begin: their first element, from the cache's start.

    Its values begin `block_size * head_size` elements later.

    Args:
        elements: See the package.
        block: Of the cache.
        head: KV head.
        block_size: Tokens of a block.
        head_size: Channels of a key.
    """
    width = np.int64(elements.shape[1] * elements.shape[2])
    return np.int64(block) * width + head * (2 * block_size * head_size)


@compiled()
def copy_row(source: np.ndarray, target: np.ndarray) -> None:
    """`target[:] = source`, for which numba would compile the text of an error, some seconds long.

    Args:
        source: One axis.
        target: As long; may be the source itself.
    """
    for i in range(target.shape[0]):
        target[i] = source[i]


def load_row(
    elements: np.ndarray, start: int | np.int64, buffer: np.ndarray, kind: int
) -> np.ndarray:
    """Elements `[start, start + len(buffer))`, as float32.

    A float32 cache gives a view of itself; others are converted into `buffer`. (For numba alone;
    this body is the plain reference.)

    Args:
        elements: `[n]`, float32, uint16 or uint8: a cache's, flat.
        start: First element.
        buffer: float32, as long as the row.
        kind: Of the elements.
    """
    row = elements[start : start + buffer.shape[0]]
    if elements.dtype == np.float32:
        return row
    if elements.dtype == np.uint8:
        buffer[:] = E4M3_NUMBERS[row]
    elif kind == FLOAT16:
        buffer[:] = row.view(np.float16)
    else:
        buffer[:] = (row.astype(np.uint32) << 16).view(np.float32)
    return buffer


FROM_FLOAT16 = np.float32(2.0**112)
"""float16's exponents are 112 lower than float32's; the product also makes subnormals right."""


@overload(load_row, inline="always")  # type: ignore[untyped-decorator]
def _load_row(elements: Any, start: Any, buffer: Any, kind: Any) -> Any:
    if elements.dtype == types.float32:

        def view(elements: Any, start: Any, buffer: Any, kind: Any) -> Any:
            return elements[start : start + buffer.shape[0]]

        return view

    if elements.dtype == types.uint8:

        def convert_bytes(elements: Any, start: Any, buffer: Any, kind: Any) -> Any:
            row = elements[start : start + buffer.shape[0]]
            for i in range(buffer.shape[0]):
                buffer[i] = E4M3_NUMBERS[row[i]]
            return buffer

        return convert_bytes

    def convert(elements: Any, start: Any, buffer: Any, kind: Any) -> Any:
        row = elements[start : start + buffer.shape[0]]
        bits = buffer.view(np.uint32)
        if kind == FLOAT16:
            for i in range(buffer.shape[0]):
                half = np.uint32(row[i])
                bits[i] = (half & np.uint32(0x7FFF)) << np.uint32(13) | (
                    half & np.uint32(0x8000)
                ) << np.uint32(16)
            for i in range(buffer.shape[0]):
                buffer[i] *= FROM_FLOAT16
        else:
            for i in range(buffer.shape[0]):
                bits[i] = np.uint32(row[i]) << np.uint32(16)
        return buffer

    return convert
