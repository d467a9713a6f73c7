"""Attention over listed keys: it reads those keys and values, and no others."""

from __future__ import annotations

import torch
from torch.nn import functional

from sparse_attention_hub.sparse_attention.utils.kv_utils import (
    _get_num_key_value_groups,
    accumulation_dtype,
)


def attend_rows(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scaling: float,
    indices: torch.Tensor,
    weights: torch.Tensor,
    sink_logits: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of each query over its own list of keys; the formula of `mask_attention_utils`.

    Args:
        queries: `(B, H, Q, D)`.
        keys: `(B, G, K, D)`.
        values: `(B, G, K, Dv)`.
        scaling: Of the scores.
        indices: `(B, H, Q, n)`, int64 key positions.
        weights: `(B, H, Q, n)`, their probabilities; 0 = no key.
        sink_logits: `(H,)`, of learned attention sinks; None = the model has none.

    Returns:
        `(B, Q, H, Dv)`, contiguous, in the dtype of `queries`. A row without keys gives zeros.
    """
    batch, heads, num_queries, _ = queries.shape
    if not indices.shape[-1]:
        return queries.new_zeros(batch, num_queries, heads, values.shape[-1])
    logits = row_scores(queries, keys, indices) * scaling
    probabilities = weights.to(logits.dtype)
    logits = logits - torch.where(probabilities > 0, probabilities.log(), torch.inf)
    top = logits.amax(dim=-1, keepdim=True)
    top = top.masked_fill(top == -torch.inf, 0)
    mass = torch.exp(logits - top)
    total = mass.sum(dim=-1, keepdim=True)
    if sink_logits is not None:
        total = total + sink_mass(sink_logits, top)
    mass = mass / total.masked_fill(total == 0, 1)
    # Rows of one KV head side by side: (B, G, group * Q, n).
    lists = indices.reshape(batch, keys.shape[1], -1, indices.shape[-1])
    output = _weighted_sums(mass.view(lists.shape), values, lists)
    output = output.view(batch, heads, num_queries, values.shape[-1]).to(queries.dtype)
    return output.transpose(1, 2).contiguous()


def sink_mass(sink_logits: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    """What learned attention sinks add to the denominators of rows.

    Where a sink is far above all keys it is inf, which divides them to the zeros they come to.

    Args:
        sink_logits: `(H,)`.
        largest: `(B, H, Q, 1)`: what was subtracted from the logits of a row.

    Returns:
        As `largest`.
    """
    return torch.exp(sink_logits.to(largest).view(-1, 1, 1) - largest)


def row_scores(queries: torch.Tensor, keys: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Dot products of queries with the keys listed for them.

    One KV head at a time: the keys picked for it stay in the processor's cache.

    Args:
        queries: `(B, H, Q, D)`.
        keys: `(B, G, K, D)`.
        indices: `(B, H, Q, n)`, int64 key positions.

    Returns:
        `(B, H, Q, n)`, at least float32.
    """
    batch, kv_heads = keys.shape[:2]
    group = _get_num_key_value_groups(queries, keys)
    rows = queries.to(accumulation_dtype(queries.dtype))
    rows = rows.reshape(batch, kv_heads, group * queries.shape[2], -1)
    lists = indices.reshape(batch, kv_heads, group * queries.shape[2], -1)
    scores = torch.empty(lists.shape, dtype=rows.dtype, device=rows.device)
    for b in range(lists.shape[0]):
        for g in range(lists.shape[1]):
            picked = keys[b, g].index_select(0, lists[b, g].flatten())
            picked = picked.view(*lists.shape[2:], keys.shape[3]).to(rows.dtype)
            # One row times a matrix: the other way round is several times slower on CPUs.
            scores[b, g] = (rows[b, g].unsqueeze(1) @ picked.transpose(1, 2)).squeeze(1)
    return scores.view(indices.shape)


def _weighted_sums(
    weights: torch.Tensor, values: torch.Tensor, lists: torch.Tensor
) -> torch.Tensor:
    """Sums `(B, G, R, Dv)` of the listed values, weighted."""
    batch, kv_heads, num_keys, head_size = values.shape
    if values.dtype == torch.float32 and values.is_contiguous():
        # One table of all heads' values: rows are added up as they are read, never copied.
        offsets = torch.arange(batch * kv_heads, device=values.device) * num_keys
        sums: torch.Tensor = functional.embedding_bag(
            (lists + offsets.view(batch, kv_heads, 1, 1)).flatten(0, 2),
            values.view(-1, head_size),
            per_sample_weights=weights.flatten(0, 2),
            mode="sum",
        )
        return sums.view(*lists.shape[:3], head_size)
    sums = torch.empty(*lists.shape[:3], head_size, dtype=weights.dtype, device=weights.device)
    for b in range(batch):
        for g in range(kv_heads):
            picked = values[b, g].index_select(0, lists[b, g].flatten())
            picked = picked.view(*lists.shape[2:], head_size).to(weights.dtype)
            sums[b, g] = (weights[b, g].unsqueeze(1) @ picked).squeeze(1)
    return sums
