"""Scores as sums of table entries: what product quantisation and hash tables have in common."""

from __future__ import annotations

import torch
from torch.nn import functional


def lookup_scores(tables: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """`sum_m tables[..., m, codes[..., m]]` for each query and key.

    Args:
        tables: `(B, H, Q, M, C)`, float32.
        codes: `(B, G, K, M)`, int32 in [0, C); H is a multiple of G.

    Returns:
        float32 `(B, H, Q, K)`.
    """
    batch, heads, num_queries, num_tables, size = tables.shape
    kv_heads, num_keys = codes.shape[1], codes.shape[2]
    rows = heads // kv_heads * num_queries
    # Entries of all of a KV head's queries side by side: one visit per key and table serves them.
    entries = tables.reshape(batch, kv_heads, rows, num_tables * size).transpose(2, 3).contiguous()
    offsets = torch.arange(num_tables, device=codes.device, dtype=codes.dtype) * size
    scores = torch.empty(batch, kv_heads, rows, num_keys, dtype=torch.float32, device=tables.device)
    for b in range(batch):
        for g in range(kv_heads):
            sums = functional.embedding_bag(codes[b, g] + offsets, entries[b, g], mode="sum")
            scores[b, g] = sums.T
    return scores.view(batch, heads, num_queries, num_keys)
