"""Writing new keys and values into their blocks."""

from __future__ import annotations

import numpy as np
from numba import prange

from vllm_sparse_plugin.paged.kernels.compiled import compiled
from vllm_sparse_plugin.paged.kernels.rows import copy_row, first_key

FEW = 8
"""Tokens that one thread writes."""


@compiled()
def _write_token(
    key: np.ndarray,
    value: np.ndarray,
    elements: np.ndarray,
    flat: np.ndarray,
    block_size: int,
    token: int,
    slot: int,
) -> None:
    if slot < 0:
        return
    _, num_kv_heads, head_size = key.shape
    block, place = slot // block_size, slot % block_size
    for head in range(num_kv_heads):
        start = first_key(elements, block, head, block_size, head_size) + place * head_size
        value_start = start + block_size * head_size
        copy_row(key[token, head], flat[start : start + head_size])
        copy_row(value[token, head], flat[value_start : value_start + head_size])


@compiled(parallel=True)
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
    flat, count = elements.reshape(-1), min(key.shape[0], slots.shape[0])
    if count <= FEW:  # waking the other threads would take longer
        for token in range(count):
            _write_token(key, value, elements, flat, block_size, token, slots[token])
    else:
        for token in prange(count):
            _write_token(key, value, elements, flat, block_size, token, slots[token])
