"""Lists of tokens, a tile at a time."""

from __future__ import annotations

import numpy as np

from vllm_sparse_plugin.paged.kernels.compiled import compiled
from vllm_sparse_plugin.paged.kernels.rows import first_key
from vllm_sparse_plugin.paged.kernels.vectors import LANES, fetch

TILE = 32
"""Tokens that are worked on at once: their rows stay in the first-level cache."""
PART = 512
"""Tokens of the parts that lists are cut into, so that one long row keeps all cores busy. The same
in every batch: a row's sums must not depend on its neighbours."""


@compiled()
def locate(
    tokens: np.ndarray,
    unit: int,
    begin: int,
    end: int,
    elements: np.ndarray,
    blocks: np.ndarray,
    kv_head: int,
    block_size: int,
    head_size: int,
    keys: np.ndarray,
) -> int:
    """Where the keys of a tile are.

    Args:
        tokens: `[units, capacity]`, int32 positions; capacity 0: position i is at i.
        unit: Whose list.
        begin: Of the tile in the list; may be past the end.
        end: Of the list.
        elements: See the package.
        blocks: Of the sequence.
        kv_head: Whose keys.
        block_size: Tokens of a block.
        head_size: Elements of a row.
        keys: `[TILE]`, int64: first elements of keys, from the cache's start; written.

    Returns:
        How many tokens the tile has.
    """
    count = max(0, min(TILE, end - begin))
    is_range = tokens.shape[1] == 0
    first, start = np.int64(-block_size), np.int64(0)  # of the block of the token before
    for i in range(count):
        token = np.int64(begin + i) if is_range else np.int64(tokens[unit, begin + i])
        if token - first >= block_size or token < first:  # divisions are slow
            number = token // block_size
            first = number * block_size
            start = first_key(elements, blocks[number], kv_head, block_size, head_size)
        keys[i] = start + (token - first) * head_size
    return count


@compiled()
def fetch_rows(elements: np.ndarray, rows: np.ndarray, count: int, head_size: int) -> None:
    """Asks for rows before their turn.

    Args:
        elements: See the package.
        rows: int64: first elements, see `locate`.
        count: How many.
        head_size: Elements of a row.
    """
    for i in range(count):
        for d in range(0, head_size, LANES):
            fetch(elements, rows[i] + d)
