"""From the flags of units to one list of tokens per KV head: each token is loaded once.

A token's weights say which query heads of the KV head's group read it. Where units are KV heads,
one weight is for all of the group.
"""

from __future__ import annotations

import math

import numpy as np
from numba import prange

from vllm_sparse_plugin.paged.kernels.compiled import compiled

NOT_SELECTED = np.float32(-1e30)
"""In place of -log of a probability, which is at least 0. Finite: kernels use fast arithmetic."""


@compiled(parallel=True)
def list_group_tokens(
    flags: np.ndarray,
    probability: np.ndarray,
    lengths: np.ndarray,
    tokens: np.ndarray,
    log_weights: np.ndarray,
    counts: np.ndarray,
    selected: np.ndarray,
    key_probability: np.ndarray,
) -> None:
    """The positions that at least one unit of a KV head selects, ascending.

    Args:
        flags: See the package; capacity a multiple of 8.
        probability: `[num_queries * num_units]`, float32, of keys with flag 2.
        lengths: `[num_queries]`.
        tokens: `[num_queries * num_kv_heads, capacity]`, int32; written.
        log_weights: `[num_queries * num_kv_heads, capacity, units of a KV head]`, float32: -log of
            the probability for each unit, `NOT_SELECTED` for those that do not read the token;
            written.
        counts: `[num_queries * num_kv_heads]`, int32, of each list; written.
        selected: `[num_queries * num_units]`, int32, keys that each unit selects; written.
        key_probability: See the package.
    """
    words = flags.view(np.uint64)
    num_lists = tokens.shape[0]
    lists = num_lists // lengths.shape[0]
    group = log_weights.shape[2]
    for item in prange(num_lists):
        first = item * group
        length = np.int64(lengths[item // lists])
        positions = tokens[item]
        count = 0
        for word in range((length + 7) // 8):
            union = np.uint64(0)
            for unit in range(first, first + group):
                union |= words[unit, word]
            if union == 0:
                continue
            # Written always, kept if selected: no branch that the processor could guess wrong.
            for byte in range(8):
                positions[count] = word * 8 + byte
                count += (union >> np.uint64(8 * byte)) & np.uint64(0xFF) != 0
        counts[item] = count
        weight_of_flag = np.zeros(4, np.float32)
        weight_of_flag[0] = NOT_SELECTED
        for h in range(group):
            row = flags[first + h]
            if probability[first + h] > 0:
                weight_of_flag[2] = np.float32(-math.log(probability[first + h]))
            number = 0
            for i in range(count):
                flag = row[positions[i]]
                number += flag != 0
                log_weights[item, i, h] = weight_of_flag[flag]
            if key_probability.shape[0]:
                own = key_probability[first + h]
                for i in range(count):
                    if row[positions[i]] == 3:
                        log_weights[item, i, h] = -math.log(own[positions[i]])
            selected[first + h] = number
