"""What loads models and keeps them for several users."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from sparse_attention_hub.adapters.model_servers.base import (
    ModelEntry,
    ModelServer,
    TokenizerEntry,
)

if TYPE_CHECKING:
    from sparse_attention_hub.adapters.model_servers.huggingface import ModelServerHF
    from sparse_attention_hub.adapters.model_servers.vllm import ModelServerVLLM

_HOMES = {"ModelServerHF": "huggingface", "ModelServerVLLM": "vllm"}

__all__ = ["ModelEntry", "ModelServer", "ModelServerHF", "ModelServerVLLM", "TokenizerEntry"]


def __getattr__(name: str) -> Any:
    """Loads a server on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
