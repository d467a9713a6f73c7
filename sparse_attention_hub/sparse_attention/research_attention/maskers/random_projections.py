"""Random projections of keys and queries, and the hash buckets that their signs make."""

from __future__ import annotations

from typing import Any

import torch

from sparse_attention_hub.sparse_attention.research_attention.maskers.sampling.counter_random import (  # noqa: E501
    normal_numbers,
)
from sparse_attention_hub.sparse_attention.utils.kv_utils import split_channels

_NUMBERS_AT_ONCE = 1 << 22
"""Projected numbers that are held together, of 20 bytes altogether."""


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


def bucket_codes(
    vectors: torch.Tensor,
    projections: torch.Tensor,
    bits: int,
    mean: torch.Tensor | None = None,
) -> torch.Tensor:
    """The bucket of each table: the signs of its projections as a number, the first one highest.

    Args:
        vectors: `(B, G, n, D)`, in any dtype.
        projections: `(G, D, L * bits)`, float32; what is projected to 0 counts as positive.
        bits: Of one table, at most 62.
        mean: `(B, G, 1, D)`, float32, subtracted from the vectors; None = nothing.

    Returns:
        `(B, G, n, L)`; int32 for tables of fewer than 32 bits, else int64.
    """
    dtype = torch.int32 if bits < 32 else torch.int64
    codes = torch.empty(
        *vectors.shape[:3], projections.shape[2] // bits, dtype=dtype, device=vectors.device
    )
    at_once = max(
        1, _NUMBERS_AT_ONCE // (len(vectors) * projections.shape[0] * projections.shape[2])
    )
    for start in range(0, vectors.shape[2], at_once):
        part = vectors[:, :, start : start + at_once].float()
        projected = (part if mean is None else part - mean) @ projections
        codes[:, :, start : start + at_once] = _codes_of_signs(projected >= 0, bits)
    return codes


def _codes_of_signs(signs: torch.Tensor, bits: int) -> torch.Tensor:
    places = torch.arange(bits - 1, -1, -1, device=signs.device)
    codes: torch.Tensor = (split_channels(signs, bits).long() << places).sum(dim=-1)
    return codes
