"""Exact scores of every key: what the oracle needs."""

from __future__ import annotations

import numpy as np
from numba import prange

from vllm_sparse_plugin.paged.kernels.compiled import compiled
from vllm_sparse_plugin.paged.kernels.rows import first_key
from vllm_sparse_plugin.paged.kernels.tile_products import pad_queries, padded, score_tile

_AHEAD = 8
"""Keys that are asked for before their turn."""


@compiled(parallel=True, fastmath=True)
def score_keys(
    query: np.ndarray,
    elements: np.ndarray,
    kind: int,
    block_size: int,
    block_table: np.ndarray,
    rows: np.ndarray,
    lengths: np.ndarray,
    scores: np.ndarray,
) -> None:
    """Unscaled dot products of each query with every key that it sees.

    Args:
        query: `[num_queries, num_heads, head_size]`, float32.
        elements: See the package; so the next five.
        kind: Of the elements.
        block_size: Tokens of a block.
        block_table: Of the batch.
        rows: Of the queries.
        lengths: Of the queries.
        scores: `[num_queries, num_heads, capacity]`, float32; written.
    """
    num_queries, num_heads, head_size = query.shape
    num_kv_heads = elements.shape[1]
    heads = num_heads // num_kv_heads
    longest = 0
    for index in range(num_queries):
        longest = max(longest, lengths[index])
    chunks = (longest + block_size - 1) // block_size
    for item in prange(num_queries * num_kv_heads * chunks):
        index, rest = item // (num_kv_heads * chunks), item % (num_kv_heads * chunks)
        kv_head, chunk = rest // chunks, rest % chunks
        first = chunk * block_size
        count = min(block_size, lengths[index] - first)
        if count <= 0:
            continue
        start = first_key(elements, block_table[rows[index], chunk], kv_head, block_size, head_size)
        q = np.empty((heads, padded(head_size)), np.float32)
        pad_queries(query[index], kv_head * heads, q)
        keys = np.empty(count + _AHEAD, np.int64)
        for place in range(count + _AHEAD):
            keys[place] = start + place * head_size
        target = scores[index, kv_head * heads : (kv_head + 1) * heads]
        score_tile(q, elements, kind, keys[:count], count, head_size, target, first, keys[_AHEAD:])
