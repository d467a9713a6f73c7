"""Adapters: ask a language model questions about a context, densely or sparsely.

`ModelAdapterHF` runs in process and is the reference; `ModelAdapterVLLM` asks a vLLM server. Both
are loaded on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from sparse_attention_hub.adapters.base import (
    Alternative,
    AnswerDetails,
    ModelAdapter,
    ModelHubAdapterInterface,
    Request,
    RequestResponse,
    SparseAttentionAdapterInterface,
)
from sparse_attention_hub.adapters.model_servers.base import (
    ModelEntry,
    ModelServer,
    TokenizerEntry,
)
from sparse_attention_hub.adapters.utils import (
    ModelCreationError,
    ModelServerConfig,
    ModelServerError,
    ReferenceCountError,
    ResourceCleanupError,
    ServerConnectionError,
    ServerRequestError,
    ServerTimeoutError,
    TokenizerCreationError,
    cleanup_gpu_memory,
)

if TYPE_CHECKING:
    from sparse_attention_hub.adapters.huggingface import ModelAdapterHF
    from sparse_attention_hub.adapters.model_servers.huggingface import ModelServerHF
    from sparse_attention_hub.adapters.model_servers.vllm import ModelServerVLLM
    from sparse_attention_hub.adapters.vllm import ModelAdapterVLLM

_HOMES = {
    "ModelAdapterHF": "huggingface",
    "ModelAdapterVLLM": "vllm",
    "ModelServerHF": "model_servers.huggingface",
    "ModelServerVLLM": "model_servers.vllm",
}

__all__ = [
    "Alternative",
    "AnswerDetails",
    "ModelAdapter",
    "ModelAdapterHF",
    "ModelAdapterVLLM",
    "ModelCreationError",
    "ModelEntry",
    "ModelHubAdapterInterface",
    "ModelServer",
    "ModelServerConfig",
    "ModelServerError",
    "ModelServerHF",
    "ModelServerVLLM",
    "ReferenceCountError",
    "Request",
    "RequestResponse",
    "ResourceCleanupError",
    "ServerConnectionError",
    "ServerRequestError",
    "ServerTimeoutError",
    "SparseAttentionAdapterInterface",
    "TokenizerCreationError",
    "TokenizerEntry",
    "cleanup_gpu_memory",
]


def __getattr__(name: str) -> Any:
    """Loads an adapter or a server on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
