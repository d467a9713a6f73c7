"""What stands for parts of Triton's interpreter, in tests of kernels and in dry engines."""

from collections.abc import Iterator
from typing import Any

from tests.plugin.triton import known_types, matrix_products, quick_handles
from tests.plugin.triton.recorded_operations import operations


def replaced_parts() -> Iterator[tuple[Any, str, Any]]:
    """Places, names and what is to stand there, once `triton.language` computes with numpy."""
    yield from known_types.REPLACED
    yield from matrix_products.REPLACED
    yield from quick_handles.REPLACED
    yield from operations()
