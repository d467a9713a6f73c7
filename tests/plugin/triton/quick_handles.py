"""What the interpreter wraps around numpy's arrays, made without looking at them again.

It checks at each result that the array's type is not too wide for Triton's, and finds out for each
address how large what it points to is.
"""

from typing import Any

import numpy as np
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def quick_handle(data: Any, dtype: Any) -> TensorHandle:
    """A handle of numbers whose type is known to fit."""
    handle = TensorHandle.__new__(TensorHandle)
    handle.data, handle.dtype, handle.attr = data, dtype, {}
    return handle


def _make_handle(self: TensorHandle, data: Any, dtype: Any, attr: Any = None) -> None:
    self.data, self.dtype, self.attr = data, dtype, {} if attr is None else attr


def _add_to_pointers(self: Any, pointers: TensorHandle, offsets: TensorHandle) -> TensorHandle:
    kind = pointers.dtype
    try:
        size = kind._bytes_of_element
    except AttributeError:
        # A single bit has a byte of its own.
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        kind._bytes_of_element = size
    return quick_handle(pointers.data + size * offsets.data.astype(np.uint64), kind)


REPLACED: tuple[tuple[Any, str, Any], ...] = (
    (TensorHandle, "__init__", _make_handle),
    (InterpreterBuilder, "create_addptr", _add_to_pointers),
)
"""See `replaced_parts`."""
