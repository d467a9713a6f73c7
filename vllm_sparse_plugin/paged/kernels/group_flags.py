"""Flags of query heads as flags of their KV heads, and back: for maskers that select by group."""

from __future__ import annotations

import numpy as np
from numba import prange

from vllm_sparse_plugin.paged.kernels.compiled import compiled
from vllm_sparse_plugin.paged.kernels.rows import copy_row


@compiled(parallel=True)
def pool_flags(flags: np.ndarray, lengths: np.ndarray, pooled: np.ndarray) -> None:
    """Gives a KV head what any query head of its group has selected.

    Args:
        flags: See the package; units are query heads, none of which has sampled; capacity a
            multiple of 8.
        lengths: `[num_queries]`.
        pooled: `[num_queries * num_kv_heads, capacity]`, uint8; written up to the next eight.
    """
    words, result = flags.view(np.uint64), pooled.view(np.uint64)
    group = flags.shape[0] // pooled.shape[0]
    units = pooled.shape[0] // lengths.shape[0]
    for unit in prange(pooled.shape[0]):
        count = (np.int64(lengths[unit // units]) + 7) // 8
        row = result[unit, :count]
        copy_row(words[unit * group, :count], row)
        for head in range(unit * group + 1, (unit + 1) * group):
            own = words[head, :count]
            for i in range(count):
                row[i] |= own[i]


@compiled(parallel=True)
def spread_flags(pooled: np.ndarray, lengths: np.ndarray, flags: np.ndarray) -> None:
    """Gives every query head what its KV head has selected.

    Args:
        pooled: `[num_queries * num_kv_heads, capacity]`, uint8.
        lengths: `[num_queries]`.
        flags: `[num_queries * num_heads, capacity]`, uint8; written.
    """
    group = flags.shape[0] // pooled.shape[0]
    units = flags.shape[0] // lengths.shape[0]
    for unit in prange(flags.shape[0]):
        length = np.int64(lengths[unit // units])
        copy_row(pooled[unit // group, :length], flags[unit, :length])
