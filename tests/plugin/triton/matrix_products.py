"""Matrix products in the interpreter whose columns do not depend on where they are.

numpy's BLAS adds a column's products in an order that depends on its place in the matrix (OpenBLAS
on AVX2), a tensor core's is the same for all columns. In float64 the order cannot be seen any more:
the products of what is multiplied here are exact, and sums are rounded to float32 once.
"""

from typing import Any

import numpy as np
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_dot = InterpreterBuilder.create_dot


def _dot_of_any_order(self: Any, a: Any, b: Any, d: Any, *precision: Any) -> TensorHandle:
    if d.data.dtype != np.float32 or {a.dtype.primitive_bitwidth, b.dtype.primitive_bitwidth} & {8}:
        return _dot(self, a, b, d, *precision)
    product = np.matmul(a.data, b.data, dtype=np.float64)
    return TensorHandle(product.astype(np.float32) + d.data, d.dtype.scalar)


REPLACED = ((InterpreterBuilder, "create_dot", _dot_of_any_order),)
"""See `replaced_parts`."""
