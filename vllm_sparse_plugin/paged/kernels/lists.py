"""From flags to lists of tokens."""

from __future__ import annotations

import numpy as np
from numba import prange

from vllm_sparse_plugin.paged.kernels.compiled import compiled


@compiled(parallel=True)
def clear_flags(flags: np.ndarray, lengths: np.ndarray) -> None:
    """Unselects every key that a query sees, and fills up to the next eight."""
    num_units = flags.shape[0] // lengths.shape[0]
    for unit in prange(flags.shape[0]):
        flags[unit, : (lengths[unit // num_units] + 7) // 8 * 8] = 0


@compiled(parallel=True)
def list_tokens(
    flags: np.ndarray, lengths: np.ndarray, tokens: np.ndarray, counts: np.ndarray
) -> None:
    """The positions of flagged keys, ascending.

    Args:
        flags: See the package; capacity a multiple of 8.
        lengths: `[num_queries]`.
        tokens: `[num_queries * num_units, capacity]`, int32; written.
        counts: `[num_queries * num_units]`, int32; written.
    """
    words = flags.view(np.uint64)
    num_units = flags.shape[0] // lengths.shape[0]
    for unit in prange(flags.shape[0]):
        length = lengths[unit // num_units]
        count = 0
        for word in range((length + 7) // 8):
            if words[unit, word] == 0:  # most keys are not selected
                continue
            for token in range(word * 8, min(word * 8 + 8, length)):
                # Written in any case, since no processor can guess which keys are selected: the
                # next one that is takes the place.
                tokens[unit, count] = token
                count += flags[unit, token] != 0
        counts[unit] = count
