"""Writing new keys and values into their blocks."""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from vllm_sparse_plugin.paged.kernels.rows import first_key


@njit(parallel=True, nogil=True, cache=True)  # type: ignore[untyped-decorator]
def write_rows(
    key: np.ndarray, value: np.ndarray, elements: np.ndarray, block_size: int, slots: np.ndarray
) -> None:
    """Writes a row of key and a row of value per token and KV head.

    Args:
        key: `[num_tokens, num_kv_heads, head_size]`, of the elements' type; `value` likewise.
        value: See `key`.
        elements: See the package.
        block_size: Tokens of a block.
        slots: `[>= num_tokens]`, block * block size + place in it; negative = padding.
    """
    _, num_kv_heads, head_size = key.shape
    flat = elements.reshape(-1)
    for token in prange(min(key.shape[0], slots.shape[0])):
        if slots[token] < 0:
            continue
        block, place = slots[token] // block_size, slots[token] % block_size
        for head in range(num_kv_heads):
            start = first_key(elements, block, head, block_size, head_size) + place * head_size
            value_start = start + block_size * head_size
            flat[start : start + head_size] = key[token, head]
            flat[value_start : value_start + head_size] = value[token, head]
