"""What stands for parts of Triton's interpreter, in tests of kernels and in dry engines."""

from collections.abc import Callable, Iterator
from typing import Any

import triton.language as tl
from triton.runtime import interpreter

from tests.plugin.triton import known_types, matrix_products, quick_handles
from tests.plugin.triton.recorded_operations import operations


def patch_language() -> None:
    """Lets `triton.language` compute with numpy.

    Once is enough. By itself the interpreter does so at each call of a function, which takes longer
    than the functions do; see `replaced_parts`.
    """

    def sees_both_modules() -> None:
        pass

    names = {"tl": tl, "core": tl.core}
    interpreter._patch_lang(type(sees_both_modules)(sees_both_modules.__code__, names))


class _NothingToRestore:
    def restore(self) -> None:
        pass


def _already_patched(function: Callable[..., Any]) -> _NothingToRestore:
    return _NothingToRestore()


def replaced_parts() -> Iterator[tuple[Any, str, Any]]:
    """Places, names and what is to stand there, after `patch_language`."""
    yield interpreter, "_patch_lang", _already_patched
    yield from known_types.REPLACED
    yield from matrix_products.REPLACED
    yield from quick_handles.REPLACED
    yield from operations()
