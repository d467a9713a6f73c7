"""Memory that is used again and again: fresh memory costs a page fault per 4 KiB."""

from __future__ import annotations

import math
import threading

import numpy as np
import numpy.typing as npt


class _Scratch(threading.local):
    def __init__(self) -> None:
        self.buffers: dict[str, np.ndarray] = {}


_scratch = _Scratch()


def scratch(name: str, shape: tuple[int, ...], dtype: npt.DTypeLike) -> np.ndarray:
    """An array with anything in it, valid until this thread asks for the same name again.

    Args:
        name: Of the memory; each use has its own.
        shape: Of the array.
        dtype: Of the array.
    """
    wanted = np.dtype(dtype)
    size = math.prod(shape) * wanted.itemsize
    buffer = _scratch.buffers.get(name)
    if buffer is None or buffer.nbytes < size:
        # Half as much again, so that growing sequences do not ask for more at each step.
        buffer = np.empty((size + size // 2) // 8 + 1, np.float64)
        _scratch.buffers[name] = buffer
    array: np.ndarray = buffer.view(np.uint8)[:size].view(wanted).reshape(shape)
    return array
