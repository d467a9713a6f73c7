"""Query heads that share a KV head, without ever copying a key or a value per query head."""

from __future__ import annotations

import torch


def _get_num_key_value_groups(queries: torch.Tensor, keys: torch.Tensor) -> int:
    """Query heads per KV head.

    Args:
        queries: `(B, H, Q, D)`.
        keys: `(B, G, K, D)`.

    Raises:
        ValueError: H is not a multiple of G.
    """
    num_heads, num_kv_heads = queries.shape[1], keys.shape[1]
    if num_kv_heads == 0 or num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} query heads are not a multiple of {num_kv_heads} KV heads")
    return num_heads // num_kv_heads


def repeat_kv(hidden_states: torch.Tensor, num_key_value_groups: int) -> torch.Tensor:
    """Copies each KV head once per query head of its group.

    Nothing in this package calls it on a hot path; it is the plain form of what
    `grouped_scores` and `grouped_sum` compute.

    Args:
        hidden_states: `(B, G, K, D)`.
        num_key_value_groups: Copies.

    Returns:
        `(B, G * num_key_value_groups, K, D)`; the input itself for one copy.
    """
    if num_key_value_groups == 1:
        return hidden_states
    return hidden_states.repeat_interleave(num_key_value_groups, dim=1)


def split_channels(tensor: torch.Tensor, size: int) -> torch.Tensor:
    """`(..., n * size)` as `(..., n, size)`."""
    return tensor.reshape(*tensor.shape[:-1], -1, size)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 for half-precision types, else the type itself."""
    return torch.promote_types(dtype, torch.float32)


def grouped_scores(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Dot products of queries with the keys of their group.

    Args:
        queries: `(B, H, Q, D)`.
        keys: `(B, G, K, D)`.

    Returns:
        `(B, H, Q, K)` in at least float32.

    Raises:
        ValueError: H is not a multiple of G.
    """
    groups = _get_num_key_value_groups(queries, keys)
    batch, num_heads, num_queries, head_size = queries.shape
    dtype = accumulation_dtype(queries.dtype)
    rows = queries.to(dtype).reshape(batch, keys.shape[1], groups * num_queries, head_size)
    scores = rows @ keys.to(dtype).transpose(2, 3)
    return scores.view(batch, num_heads, num_queries, keys.shape[2])


def grouped_sum(weights: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Weighted sums of the values of each query head's group.

    Args:
        weights: `(B, H, Q, K)`.
        values: `(B, G, K, Dv)`.

    Returns:
        `(B, H, Q, Dv)` in the dtype of `weights`.

    Raises:
        ValueError: H is not a multiple of G.
    """
    groups = _get_num_key_value_groups(weights, values)
    batch, num_heads, num_queries, num_keys = weights.shape
    rows = weights.reshape(batch, values.shape[1], groups * num_queries, num_keys)
    sums = rows @ values.to(weights.dtype)
    return sums.view(batch, num_heads, num_queries, values.shape[-1])
