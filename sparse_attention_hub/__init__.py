"""Composable sparse-attention maskers, and adapters that run them inside language models.

Importing this package is cheap: everything below is loaded when it is first asked for, and
transformers or the openai client only by the adapter that needs them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparse_attention_hub.adapters import (
        ModelAdapter,
        ModelAdapterHF,
        ModelAdapterVLLM,
        ModelHubAdapterInterface,
        Request,
        RequestResponse,
        SparseAttentionAdapterInterface,
    )
    from sparse_attention_hub.metric_logging import MicroMetricLogger
    from sparse_attention_hub.plotting import Granularity, PlotGenerator
    from sparse_attention_hub.sparse_attention import (
        EfficientAttention,
        ResearchAttention,
        SparseAttention,
    )

__version__ = "0.1.0"
__author__ = "The sparse-attention-hub authors"

_HOMES = {
    "EfficientAttention": "sparse_attention",
    "SparseAttention": "sparse_attention",
    "ResearchAttention": "sparse_attention",
    "Request": "adapters",
    "RequestResponse": "adapters",
    "ModelHubAdapterInterface": "adapters",
    "SparseAttentionAdapterInterface": "adapters",
    "ModelAdapter": "adapters",
    "ModelAdapterHF": "adapters",
    "ModelAdapterVLLM": "adapters",
    "MicroMetricLogger": "metric_logging",
    "PlotGenerator": "plotting",
    "Granularity": "plotting",
}

__all__ = [
    "EfficientAttention",
    "Granularity",
    "MicroMetricLogger",
    "ModelAdapter",
    "ModelAdapterHF",
    "ModelAdapterVLLM",
    "ModelHubAdapterInterface",
    "PlotGenerator",
    "Request",
    "RequestResponse",
    "ResearchAttention",
    "SparseAttention",
    "SparseAttentionAdapterInterface",
    "__author__",
    "__version__",
]


def __getattr__(name: str) -> Any:
    """Loads a public name on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
