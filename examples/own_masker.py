"""A masker of one's own: this file is all there is to it.

In process, importing it makes the masker usable by its name, `strided`; a server is told to import
it: `"imports": ["examples.own_masker"]`. `examples.serve_own_masker` does both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from sparse_attention_hub.sparse_attention.research_attention.maskers.base import (
    MaskerConfig,
    MaskerRegistry,
    ResearchMasker,
    add_selected,
    require_config,
    unselected_keys,
)
from sparse_attention_hub.sparse_attention.utils.mask import Mask


@dataclass(frozen=True)
class StridedMaskerConfig(MaskerConfig):
    """Which keys are read.

    Attributes:
        stride: Every key at a multiple of this position.
    """

    stride: int

    def __post_init__(self) -> None:
        """Checks the stride.

        Raises:
            ValueError: It is not an integer >= 1.
        """
        if isinstance(self.stride, bool) or not isinstance(self.stride, int) or self.stride < 1:
            raise ValueError(f"stride must be an integer >= 1, got {self.stride!r}")


@MaskerRegistry.register(StridedMaskerConfig)
class StridedMasker(ResearchMasker):
    """Reads every n-th key that the query may see (Child et al. 2019, the strided pattern)."""

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
        if previous_mask.is_full_mask():
            return previous_mask
        config = require_config(self.config, StridedMaskerConfig)
        strided = torch.arange(keys.shape[2], device=keys.device) % config.stride == 0
        return add_selected(previous_mask, unselected_keys(previous_mask, attention_mask) & strided)

    @classmethod
    def create_from_config(cls, config: MaskerConfig) -> StridedMasker:
        """See `ResearchMasker.create_from_config`."""
        return cls(require_config(config, StridedMaskerConfig))
