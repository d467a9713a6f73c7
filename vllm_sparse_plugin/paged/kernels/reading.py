"""Reading keys and values out of their blocks, as they are stored."""

from __future__ import annotations

import numpy as np
from numba import prange

from vllm_sparse_plugin.paged.kernels.compiled import compiled
from vllm_sparse_plugin.paged.kernels.rows import first_key


@compiled(parallel=True)
def read_rows(
    elements: np.ndarray,
    block_size: int,
    blocks: np.ndarray,
    first_head: int,
    key: np.ndarray,
    value: np.ndarray,
) -> None:
    """Keys and values of a sequence, in token order.

    Args:
        elements: See the package.
        block_size: Tokens of a block.
        blocks: Of the sequence.
        first_head: Of the KV heads that are wanted.
        key: `[num_keys, heads, head_size]`, of the elements' type; written.
        value: Likewise.
    """
    num_keys, heads, head_size = key.shape
    flat = elements.reshape(-1)
    for number in prange((num_keys + block_size - 1) // block_size):
        begin, end = number * block_size, min((number + 1) * block_size, num_keys)
        for h in range(heads):
            row = first_key(elements, blocks[number], first_head + h, block_size, head_size)
            for token in range(begin, end):
                start = row + (token - begin) * head_size
                value_start = start + block_size * head_size
                for d in range(head_size):
                    key[token, h, d] = flat[start + d]
                for d in range(head_size):
                    value[token, h, d] = flat[value_start + d]
