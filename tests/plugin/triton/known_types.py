"""Types of Triton that know what its interpreter asks of them again and again.

It makes the types of intermediate results anew, writes their names, and looks up numpy's type for
them in a table that it makes for the purpose.
"""

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_numpy_type, _make_block_type = interpreter._get_np_dtype, tl.block_type.__init__
_make_tensor = tl.tensor.__init__


def _known_numpy_type(kind: Any) -> np.dtype:
    try:
        return kind._numpy_type
    except AttributeError:
        kind._numpy_type = _numpy_type(kind)
        return kind._numpy_type


def _make_known_block_type(self: Any, element_ty: Any, shape: Any) -> None:
    """Equal types are separate objects with the same attributes, of which nothing is changed."""
    known = element_ty.__dict__.setdefault("_block_types", {})
    key = tuple(shape)
    if key not in known:
        _make_block_type(self, element_ty, shape)
        known[key] = self.__dict__
    self.__dict__ = known[key]


def _make_tensor_of_known_type(self: Any, handle: Any, type: Any) -> None:
    try:
        self.shape, self.numel, self.dtype = type._of_tensors
    except AttributeError:
        _make_tensor(self, handle, type)
        type._of_tensors = self.shape, self.numel, self.dtype
    else:
        self.handle, self.type = handle, type


REPLACED: tuple[tuple[Any, str, Any], ...] = (
    (interpreter, "_get_np_dtype", _known_numpy_type),
    (tl.block_type, "__init__", _make_known_block_type),
    (tl.tensor, "__init__", _make_tensor_of_known_type),
)
"""See `replaced_parts`."""
