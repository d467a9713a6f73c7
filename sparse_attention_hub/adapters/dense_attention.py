"""Dense attention of a model whose attention function is one of this package's."""

from __future__ import annotations

from typing import Any

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from sparse_attention_hub.sparse_attention.utils.kv_utils import accumulation_dtype
from sparse_attention_hub.sparse_attention.utils.mask import Mask
from sparse_attention_hub.sparse_attention.utils.mask_attention_utils import (
    get_masked_attention_output,
)

MAX_SCORES = 1 << 26
"""Scores held at once (256 MiB in float32) where learned sinks take part."""


def dense_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> torch.Tensor:
    """Scaled-dot-product attention, and where the layer has them, learned attention sinks.

    torch's function knows no sinks, and transformers leaves them out without a word when it calls
    it; they are computed by this package's formula, some queries at a time.

    Args:
        module: Of the layer.
        query: `(B, H, Q, D)`.
        key: `(B, G, K, D)`.
        value: `(B, G, K, Dv)`.
        attention_mask: As transformers makes it for its "sdpa"; None = the queries are the last
            positions, and see what is before them, where the module is causal.
        scaling: Of the scores.
        dropout: Of the weights, in training.
        kwargs: The layer's; `s_aux`, `(H,)`, are the logits of learned sinks.

    Returns:
        `(B, Q, H, Dv)`.
    """
    sink_logits = kwargs.get("s_aux")
    if sink_logits is None:
        output: torch.Tensor = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )[0]
        return output
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    batch, heads, num_queries, _ = query.shape
    num_keys = key.shape[2]
    is_causal = kwargs.get("is_causal")
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    at_once = max(1, MAX_SCORES // (batch * heads * num_keys))
    outputs = []
    for start in range(0, num_queries, at_once):
        end = min(start + at_once, num_queries)
        mask = None
        if attention_mask is not None:
            mask = attention_mask[:, :, start:end]
        elif is_causal:
            positions = torch.arange(num_keys, device=query.device)
            own = positions[num_keys - num_queries + start : num_keys - num_queries + end]
            mask = (positions <= own[:, None])[None, None]
        # Not `get_true_attention_output`, which computes the weights, too.
        shape = (batch, heads, end - start, num_keys)
        every = Mask.create_full_mask(shape, accumulation_dtype(query.dtype), query.device)
        inputs = (query[:, :, start:end], key, value, mask, scaling, dropout, every)
        outputs.append(get_masked_attention_output(module, *inputs, sink_logits=sink_logits))
    return torch.cat(outputs, dim=1)
