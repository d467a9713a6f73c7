"""What every sparse attention has: a configuration, a factory, and one attention call."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class SparseAttentionConfig:
    """Base of all sparse attention configurations."""


class SparseAttention(ABC):
    """Attention that reads a part of the keys."""

    def __init__(self, sparse_attention_config: SparseAttentionConfig) -> None:
        """Keeps the configuration.

        Args:
            sparse_attention_config: Of this attention.
        """
        self.sparse_attention_config = sparse_attention_config

    @abstractmethod
    def custom_attention(
        self,
        module: torch.nn.Module | None,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float,
        dropout: float,
        sparse_meta_data: dict[Any, Any],
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention of one layer.

        Args:
            module: The attention module; None means inference.
            queries: `(B, H, Q, D)`.
            keys: `(B, G, K, D)`; H is a multiple of G.
            values: `(B, G, K, Dv)`.
            attention_mask: Additive `(B, 1 or H, Q, >= K)`, or boolean with True = may attend.
            scaling: Of the scores.
            dropout: Of the weights, in training only.
            sparse_meta_data: The maskers' cache, of one sequence or batch; a call with as many
                queries as keys starts it anew for its layer.
            kwargs: Such as `layer_idx`, and `s_aux`, `(H,)`, the logits of learned attention sinks.

        Returns:
            The output `(B, Q, H, Dv)` and, where there are any, the weights `(B, H, Q, K)`.
        """

    def pre_attention_hook_generator(self) -> None:
        """Returns None: no attention here needs a hook before the layer runs."""
        return None

    @classmethod
    def create_from_config(cls, config: SparseAttentionConfig) -> SparseAttention:
        """Builds the attention that a configuration describes.

        Of a configuration that is not this package's, a class that can be instantiated is made
        itself: `cls(config)`.

        Raises:
            TypeError: The configuration is of a type that no attention is made from.
        """
        # Imported here: this is the base class of what it builds.
        from sparse_attention_hub.sparse_attention.efficient_attention import (
            EfficientAttention,
            EfficientAttentionConfig,
        )
        from sparse_attention_hub.sparse_attention.research_attention import (
            ResearchAttention,
            ResearchAttentionConfig,
        )

        if isinstance(config, ResearchAttentionConfig):
            return ResearchAttention.create_from_config(config)
        if isinstance(config, EfficientAttentionConfig):
            return EfficientAttention.create_from_config(config)
        if not inspect.isabstract(cls):
            return cls(config)
        raise TypeError(
            f"expected a ResearchAttentionConfig or an EfficientAttentionConfig, got "
            f"{type(config).__name__}"
        )
