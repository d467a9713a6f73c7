"""Which layers of a model can be sparse in process, and what is said of the others."""

from __future__ import annotations

import logging
from typing import Any

from sparse_attention_hub.sparse_attention.named_layers import named_in_vain
from sparse_attention_hub.sparse_attention.research_attention import (
    ResearchAttention,
    ResearchAttentionConfig,
)

logger = logging.getLogger(__name__)

_WITHOUT_ATTENTION = ("conv", "linear_attention", "mamba", "moe")
"""Kinds of layers, as transformers' configurations call them."""


def restricts(window: int | None, config: Any) -> bool:
    """Whether a sliding window ever hides a key; some models have one longer than themselves.

    Args:
        window: In keys; None = there is none.
        config: Of the model.
    """
    longest = getattr(config, "max_position_embeddings", None)
    return window is not None and (longest is None or window < longest)


def say_what_stays_dense(config: Any, attention: Any) -> None:
    """Warns of layers with a window, and of what a configuration says in vain.

    Args:
        config: Of the model's text part.
        attention: Of the adapter.
    """
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if kinds is None:
        usual = "full_attention" if window is None else "sliding_attention"
        kinds = [usual] * config.num_hidden_layers
    windowed = {
        layer
        for layer, kind in enumerate(kinds)
        if kind == "sliding_attention" and restricts(window, config)
    }
    if windowed:
        logger.warning(
            "sparse attention: %d of %d layers have a sliding window and stay dense",
            len(windowed),
            len(kinds),
        )
    every = {layer for layer, kind in enumerate(kinds) if kind not in _WITHOUT_ATTENTION}
    named = getattr(attention, "sparse_attention_config", None)
    if not isinstance(attention, ResearchAttention) or not isinstance(
        named, ResearchAttentionConfig
    ):
        return
    message = named_in_vain(named, every, every - windowed)
    if message is not None:
        logger.warning(message)
