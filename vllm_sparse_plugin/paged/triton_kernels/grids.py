"""How kernels are launched: for what they are compiled, and by how many programs.

Both from shapes alone, never from lengths.
"""

from __future__ import annotations

import triton

_PROGRAMS = 2048
"""About as many as a large GPU runs at once: of four warps with few registers, 16 per processor."""

launched = triton.jit(
    do_not_specialize=[
        "lengths",
        "whole",
        "every",
        "rows",
        "counts",
        "begins",
        "ends",
        "ranges",
        "ranges_stride",
        "totals",
        "sizes",
        "probability",
        "layer",
        "places",
        "digest",
        "reads",
        "count",
        "num_tokens",
        "programs",
    ]
)
"""Decorator of kernels; functions that they call have Triton's own.

Triton compiles a kernel again when an integer is 1, or a multiple of 16, or an address is a
multiple of 16 bytes, and another one was not. What these names stand for differs from step to step,
with the number of queries or tokens; and that is nothing to wait seconds for in the middle of
serving. All that is lost are wide loads of what kernels only load single numbers of.
"""


def programs_per_row(rows: int, capacity: int, tile: int) -> int:
    """Programs that share a row's tiles; each takes every n-th of those that are in use.

    Only for kernels whose results do not depend on it.

    Args:
        rows: Of the launch.
        capacity: Of a row.
        tile: Of a row, what a program works on at once.
    """
    return max(1, min(_PROGRAMS // max(1, rows), -(-capacity // tile)))


def power_of_2(size: int) -> int:
    """The smallest power of 2 that is not less: Triton's blocks have such sizes."""
    return 1 << max(0, size - 1).bit_length()
