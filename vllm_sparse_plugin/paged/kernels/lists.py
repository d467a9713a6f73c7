"""From flags to lists of tokens, and what that comes to in keys read."""

from __future__ import annotations

import math

import numpy as np
from numba import njit, prange


@njit(parallel=True, nogil=True, cache=True)  # type: ignore[untyped-decorator]
def clear_flags(flags: np.ndarray, lengths: np.ndarray) -> None:
    """Unselects every key that a query sees, and fills up to the next eight."""
    num_units = flags.shape[0] // lengths.shape[0]
    for unit in prange(flags.shape[0]):
        flags[unit, : (lengths[unit // num_units] + 7) // 8 * 8] = 0


@njit(parallel=True, nogil=True, cache=True)  # type: ignore[untyped-decorator]
def list_tokens(
    flags: np.ndarray,
    probability: np.ndarray,
    lengths: np.ndarray,
    tokens: np.ndarray,
    log_weights: np.ndarray,
    counts: np.ndarray,
) -> None:
    """The positions of flagged keys, ascending, with -log of their probabilities.

    Args:
        flags: See the package; capacity a multiple of 8.
        probability: `[num_queries * num_units]`, float32, of keys with flag 2.
        lengths: `[num_queries]`.
        tokens: `[num_queries * num_units, capacity]`, int32; written.
        log_weights: float32, likewise; or of capacity 0, when nothing is sampled.
        counts: `[num_queries * num_units]`, int32; written.
    """
    words = flags.view(np.uint64)
    num_units = flags.shape[0] // lengths.shape[0]
    is_weighted = log_weights.shape[1] > 0
    for unit in prange(flags.shape[0]):
        length = lengths[unit // num_units]
        count = 0
        weight_of = np.zeros(3, np.float32)  # by flag
        if is_weighted and probability[unit] > 0:
            weight_of[2] = -math.log(probability[unit])
        for word in range((length + 7) // 8):
            if words[unit, word] == 0:  # most keys are not selected
                continue
            for token in range(word * 8, min(word * 8 + 8, length)):
                # Written in any case, since no processor can guess which keys are selected: the
                # next one that is takes the place.
                flag = flags[unit, token]
                tokens[unit, count] = token
                if is_weighted:
                    log_weights[unit, count] = weight_of[flag]
                count += flag != 0
        counts[unit] = count


@njit(parallel=True, nogil=True, cache=True)  # type: ignore[untyped-decorator]
def count_loaded(flags: np.ndarray, lengths: np.ndarray, num_kv_heads: int) -> np.ndarray:
    """Keys that at least one unit of a KV head selects: what has to be loaded for it.

    Args:
        flags: See the package.
        lengths: `[num_queries]`.
        num_kv_heads: A divisor of the number of units.

    Returns:
        `[num_queries, num_kv_heads]`, int64.
    """
    words = flags.view(np.uint64)
    num_queries = lengths.shape[0]
    num_units = flags.shape[0] // num_queries
    group = num_units // num_kv_heads
    loaded = np.zeros((num_queries, num_kv_heads), np.int64)
    for item in prange(num_queries * num_kv_heads):
        index, kv_head = item // num_kv_heads, item % num_kv_heads
        first = index * num_units + kv_head * group
        count = 0
        for word in range((lengths[index] + 7) // 8):
            union = np.uint64(0)
            for unit in range(first, first + group):
                union |= words[unit, word]
            if union == 0:
                continue
            for byte in range(8):
                count += (union >> np.uint64(8 * byte)) & np.uint64(0xFF) != 0
        loaded[index, kv_head] = count
    return loaded
