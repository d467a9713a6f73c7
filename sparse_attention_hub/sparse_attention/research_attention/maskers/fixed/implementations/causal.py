"""Causal masker: adds nothing; causality comes with the attention mask."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from sparse_attention_hub.sparse_attention.research_attention.maskers.base import (
    MaskerConfig,
    MaskerFacts,
    MaskerRegistry,
)
from sparse_attention_hub.sparse_attention.research_attention.maskers.fixed.base import (
    FixedMasker,
    FixedMaskerConfig,
)
from sparse_attention_hub.sparse_attention.utils.mask import Mask


@MaskerRegistry.register(FixedMaskerConfig)
class CausalMasker(FixedMasker):
    """Returns what was selected before: attention here is causal by its attention mask."""

    facts: ClassVar[MaskerFacts] = MaskerFacts(
        paper="(selects nothing)",
        is_paged=True,
    )

    def add_mask(
        self,
        keys: torch.Tensor,
        queries: torch.Tensor,
        values: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float,
        dropout: float,
        sparse_meta_data: dict[Any, Any],
        previous_mask: Mask,
        **kwargs: Any,
    ) -> Mask:
        """See `ResearchMasker.add_mask`."""
        return previous_mask

    @classmethod
    def create_from_config(cls, config: MaskerConfig) -> CausalMasker:
        """See `ResearchMasker.create_from_config`."""
        # Exactly: the configurations of other maskers derive from it.
        if type(config) is not FixedMaskerConfig:
            raise ValueError(f"expected a FixedMaskerConfig, got {type(config).__name__}")
        return cls(config)
