"""Sink masker: the first keys (attention sinks, StreamingLLM, Xiao et al. 2023, section 3.1)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from sparse_attention_hub.sparse_attention.research_attention.maskers.base import (
    MaskerConfig,
    MaskerFacts,
    MaskerRegistry,
    add_selected,
    require_config,
)
from sparse_attention_hub.sparse_attention.research_attention.maskers.fixed.base import (
    FixedMasker,
    FixedMaskerConfig,
)
from sparse_attention_hub.sparse_attention.research_attention.maskers.single_row import (
    add_range,
    is_single_row,
)
from sparse_attention_hub.sparse_attention.research_attention.maskers.sizes import (
    Size,
    checked_size,
    resolve_size,
    visible_counts,
)
from sparse_attention_hub.sparse_attention.utils.mask import Mask
from sparse_attention_hub.sparse_attention.visibility import visible_keys


@dataclass(frozen=True)
class SinkMaskerConfig(FixedMaskerConfig):
    """How many leading keys are always read.

    Attributes:
        sink_size: A number of keys, or a share of the keys that a query may see.
        search_space: For tuners; no part of what the masker does.
    """

    sink_size: Size
    search_space: dict[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        """Checks the size.

        Raises:
            ValueError: `sink_size` is neither an integer >= 1 nor a float in (0, 1].
        """
        object.__setattr__(self, "sink_size", checked_size("sink_size", self.sink_size))


@MaskerRegistry.register(SinkMaskerConfig)
class SinkMasker(FixedMasker):
    """Selects the first `sink_size` keys that a query may see.

    With padding on the left these are the sequence's first tokens, not the padding.
    """

    facts: ClassVar[MaskerFacts] = MaskerFacts(
        paper="StreamingLLM, Xiao et al. 2023",
        is_paged=True,
    )

    def __init__(self, config: SinkMaskerConfig) -> None:
        """Keeps the configuration.

        Args:
            config: Of this masker.
        """
        super().__init__(config)
        self.sink_size = config.sink_size

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
        num_keys = keys.shape[2]
        if isinstance(self.sink_size, int) and num_keys <= self.sink_size:
            return Mask.create_full_mask(previous_mask.shape, previous_mask.dtype, keys.device)
        if is_single_row(previous_mask, attention_mask):
            return add_range(previous_mask, 0, resolve_size(self.sink_size, num_keys))
        size = resolve_size(self.sink_size, visible_counts(attention_mask, num_keys))
        visible = visible_keys(attention_mask, num_keys)
        if visible is None:
            selected = torch.arange(num_keys, device=keys.device) < size
        else:
            selected = visible & (visible.cumsum(dim=-1) <= size)
        return add_selected(previous_mask, selected)

    @classmethod
    def create_from_config(cls, config: MaskerConfig) -> SinkMasker:
        """See `ResearchMasker.create_from_config`."""
        return cls(require_config(config, SinkMaskerConfig))
