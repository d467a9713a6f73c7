"""Oracle top-k masker: the keys with the highest exact scores (an upper bound of top-k methods)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from sparse_attention_hub.sparse_attention.research_attention.maskers.base import (
    MaskerConfig,
    MaskerFacts,
    MaskerRegistry,
    require_config,
)
from sparse_attention_hub.sparse_attention.research_attention.maskers.fixed.base import (
    TopKMasker,
    TopKMaskerConfig,
)
from sparse_attention_hub.sparse_attention.utils.kv_utils import grouped_scores


def _search_space() -> dict[str, Any]:
    return {"heavy_size": {"grid_search": [step / 100 for step in range(1, 11)]}}


@dataclass(frozen=True)
class OracleTopKConfig(TopKMaskerConfig):
    """How many heavy hitters are read beyond what other maskers selected.

    Attributes:
        search_space: For tuners; no part of what the masker does.
    """

    search_space: dict[str, Any] = field(default_factory=_search_space, compare=False)


@MaskerRegistry.register(OracleTopKConfig)
class OracleTopKMasker(TopKMasker):
    """Ranks keys by their exact dot product with the query; it reads every key to do so."""

    facts: ClassVar[MaskerFacts] = MaskerFacts(
        paper="(upper bound of top-k)",
        is_paged=True,
    )

    def scores(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        attention_mask: torch.Tensor | None,
        sparse_meta_data: dict[Any, Any],
        layer_idx: int,
    ) -> torch.Tensor:
        """See `TopKMasker.scores`."""
        return grouped_scores(queries, keys)

    @classmethod
    def create_from_config(cls, config: MaskerConfig) -> OracleTopKMasker:
        """See `ResearchMasker.create_from_config`."""
        return cls(require_config(config, OracleTopKConfig))


OracleTopK = OracleTopKMasker
"""The name in the field's API."""
