"""What was selected, as lists of tokens: what attention reads, and what samplers look at."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vllm_sparse_plugin.paged.kernels.group_lists import list_group_tokens
from vllm_sparse_plugin.paged.kernels.lists import list_tokens
from vllm_sparse_plugin.paged.scratch import scratch

NO_KEY_PROBABILITY = np.empty((0, 0), np.float32)
"""Where no key is sampled with a probability of its own."""
EVERY_KEY = np.empty((0, 0), np.int32)
"""Instead of `TokenLists.tokens`: each list is the positions before its count."""
NO_WEIGHTS = np.empty((0, 0, 1), np.float32)
"""Instead of `TokenLists.log_weights`: all weights are 1."""


@dataclass(frozen=True)
class TokenLists:
    """One list per query and KV head; what its query heads share is listed, and loaded, once.

    Attributes:
        tokens: `[num_queries * num_kv_heads, capacity]`, int32 positions, ascending.
        log_weights: `[num_queries * num_kv_heads, capacity, heads of a group]`, float32, see
            `kernels.group_lists`; or `[..., 1]`, one weight for all of them; or `NO_WEIGHTS`: every
            query head reads all tokens, with weight 1.
        counts: `[num_queries * num_kv_heads]`, int32, tokens of each list.
        keys_read: `[num_queries]`, int64, keys selected, summed over query heads.
    """

    tokens: np.ndarray
    log_weights: np.ndarray
    counts: np.ndarray
    keys_read: np.ndarray

    @classmethod
    def of(
        cls,
        flags: np.ndarray,
        probability: np.ndarray,
        lengths: np.ndarray,
        num_heads: int,
        num_kv_heads: int,
        is_sampled: bool,
        key_probability: np.ndarray = NO_KEY_PROBABILITY,
    ) -> TokenLists:
        """Lists what units have selected.

        Args:
            flags: See `kernels`; units are query heads or KV heads.
            probability: `[num_queries * num_units]`, float32, of sampled keys.
            lengths: `[num_queries]`, int32.
            num_heads: Query heads.
            num_kv_heads: KV heads.
            is_sampled: Whether keys may have been sampled. Of the maskers, not of these queries:
                kernels with and without weights differ in last bits.
            key_probability: See `kernels`.
        """
        num_queries, capacity = len(lengths), flags.shape[1]
        num_lists, width = num_queries * num_kv_heads, len(flags) // (num_queries * num_kv_heads)
        tokens = scratch("tokens", (num_lists, capacity), np.int32)
        counts = np.empty(num_lists, np.int32)
        if width > 1 or is_sampled:
            log_weights = scratch("log_weights", (num_lists, capacity, width), np.float32)
            selected = np.empty(len(flags), np.int32)
            list_group_tokens(
                flags, probability, lengths, tokens, log_weights, counts, selected, key_probability
            )
        else:
            log_weights = NO_WEIGHTS
            list_tokens(flags, lengths, tokens, counts)
            selected = counts
        keys_read = selected.reshape(num_queries, -1).sum(axis=1, dtype=np.int64)
        keys_read *= num_heads // (num_kv_heads * width)
        return cls(tokens, log_weights, counts, keys_read)
