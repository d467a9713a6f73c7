"""Layers that the configuration names, and that cannot do what it says of them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from vllm.model_executor.models.utils import extract_layer_index

from sparse_attention_hub.sparse_attention.named_layers import named_in_vain
from sparse_attention_hub.sparse_attention.research_attention import ResearchAttentionConfig

logger = logging.getLogger(__name__)


def say_without_effect(config: ResearchAttentionConfig, layers: Mapping[str, Any]) -> None:
    """Warns of maskers for layers without attention or with a window, and of others called dense.

    Recurrent layers have no attention, and some models number their attention layers apart.

    Args:
        config: The server's.
        layers: All attention layers of the engine, by name; some may have another backend, and a
            draft's have the numbers of others.
    """
    every = {extract_layer_index(name) for name in layers}
    sparse = {
        extract_layer_index(name)
        for name, layer in layers.items()
        if getattr(layer.impl, "can_be_sparse", False)
    }
    message = named_in_vain(config, every, sparse)
    if message is not None:
        logger.warning(message)
