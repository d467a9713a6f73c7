"""How many programs a launch has: from shapes alone, never from lengths."""

from __future__ import annotations

_PROGRAMS = 512
"""About as many as a large GPU runs at once."""


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
