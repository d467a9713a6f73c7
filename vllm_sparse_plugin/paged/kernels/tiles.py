"""Lists of tokens, a tile at a time."""

from __future__ import annotations

import numpy as np
from numba import njit

TILE = 32
"""Tokens that are worked on at once: their rows stay in the first-level cache."""
PART = 512
"""Tokens of the parts that lists are cut into, so that one long row keeps all cores busy. The same
in every batch: a row's sums must not depend on its neighbours."""


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def locate(
    tokens: np.ndarray,
    unit: int,
    begin: int,
    end: int,
    blocks: np.ndarray,
    block_size: int,
    head_size: int,
    places: np.ndarray,
    starts: np.ndarray,
) -> int:
    """Where the rows of a tile are.

    Args:
        tokens: `[units, capacity]`, int32 positions; capacity 0: position i is at i.
        unit: Whose list.
        begin: Of the tile in the list; may be past the end.
        end: Of the list.
        blocks: Of the sequence.
        block_size: Tokens of a block.
        head_size: Elements of a row.
        places: `[TILE]`, int64: blocks; written.
        starts: `[TILE]`, int64: first elements of keys in their blocks; written.

    Returns:
        How many tokens the tile has.
    """
    count = max(0, min(TILE, end - begin))
    is_range = tokens.shape[1] == 0
    for i in range(count):
        token = begin + i if is_range else np.int64(tokens[unit, begin + i])
        places[i] = blocks[token // block_size]
        starts[i] = token % block_size * head_size
    return count
