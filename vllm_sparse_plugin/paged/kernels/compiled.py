"""How numba compiles the functions of this package."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

from numba import njit

Result = TypeVar("Result")


def compiled(
    *, parallel: bool = False, inline: bool = False, fastmath: bool | set[str] = False
) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
    """A function that numba compiles when it is first called, and keeps; it lets other threads run.

    Nothing here divides by what may be zero, so divisions are not checked for it (`error_model`):
    each check would be a branch more to compile, and to take.

    Args:
        parallel: Its `prange`s run on numba's threads.
        inline: It becomes part of its callers.
        fastmath: Sums may be reordered, or what else a set of LLVM's flags allows.
    """
    decorator = njit(
        parallel=parallel,
        inline="always" if inline else "never",
        fastmath=fastmath,
        error_model="numpy",
        nogil=True,
        cache=True,
    )
    return cast(Callable[[Callable[..., Result]], Callable[..., Result]], decorator)
