"""Random projections of keys and queries, and the hash buckets that their signs make."""

from __future__ import annotations

from typing import Any

import torch

from sparse_attention_hub.sparse_attention.research_attention.maskers.sampling.counter_random import (  # noqa: E501
    normal_numbers,
)
from sparse_attention_hub.sparse_attention.utils.kv_utils import split_channels


def projections_of_layer(
    sparse_meta_data: dict[Any, Any], seed: int, layer_idx: int, shape: tuple[int, int, int]
) -> torch.Tensor:
    """Independent normal numbers `(G, D, n)` of a layer: each KV head has its own projections.

    Args:
        sparse_meta_data: Where they are kept.
        seed: Of the configuration.
        layer_idx: Of the attention layer.
        shape: Of the result.

    Returns:
        float32 on the CPU.
    """
    state = sparse_meta_data.setdefault(("projections", seed, shape), {})
    if layer_idx not in state:
        state[layer_idx] = normal_numbers(seed, layer_idx, shape).float()
    projections: torch.Tensor = state[layer_idx]
    return projections


def bucket_codes(projected: torch.Tensor, bits: int) -> torch.Tensor:
    """The bucket of each table: the signs of its projections as a number, the first one highest.

    Args:
        projected: `(..., L * bits)`; 0 counts as positive.
        bits: Of one table, at most 62.

    Returns:
        int64 `(..., L)`.
    """
    signs = split_channels(projected >= 0, bits).long()
    codes: torch.Tensor = (signs << torch.arange(bits - 1, -1, -1, device=signs.device)).sum(dim=-1)
    return codes
