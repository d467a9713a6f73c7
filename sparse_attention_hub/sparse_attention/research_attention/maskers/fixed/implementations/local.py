"""Local masker: the most recent keys (sliding window; StreamingLLM, Xiao et al. 2023)."""

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
class LocalMaskerConfig(FixedMaskerConfig):
    """How many of the most recent keys are always read, the query's own included.

    Attributes:
        window_size: A number of keys, or a share of the keys that a query may see.
        search_space: For tuners; no part of what the masker does.
    """

    window_size: Size
    search_space: dict[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        """Checks the size.

        Raises:
            ValueError: `window_size` is neither an integer >= 1 nor a float in (0, 1].
        """
        object.__setattr__(self, "window_size", checked_size("window_size", self.window_size))


@MaskerRegistry.register(LocalMaskerConfig)
class LocalMasker(FixedMasker):
    """Selects the visible keys at positions (p - w, p] of the query at position p.

    It only adds: what other maskers selected outside the window stays selected.
    """

    facts: ClassVar[MaskerFacts] = MaskerFacts(
        paper="StreamingLLM, Xiao et al. 2023",
        is_paged=True,
    )

    def __init__(self, config: LocalMaskerConfig) -> None:
        """Keeps the configuration.

        Args:
            config: Of this masker.
        """
        super().__init__(config)
        self.window_size = config.window_size

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
        num_queries, num_keys = queries.shape[2], keys.shape[2]
        window = resolve_size(self.window_size, visible_counts(attention_mask, num_keys))
        if num_queries == 1 and isinstance(window, int) and num_keys <= window:
            return Mask.create_full_mask(previous_mask.shape, previous_mask.dtype, keys.device)
        if isinstance(window, int) and is_single_row(previous_mask, attention_mask):
            return add_range(previous_mask, num_keys - window, num_keys)
        key = torch.arange(num_keys, device=keys.device)
        query = torch.arange(num_keys - num_queries, num_keys, device=keys.device)[:, None]
        selected = (key <= query) & (key > query - window)
        visible = visible_keys(attention_mask, num_keys)
        if visible is not None:
            selected = selected & visible
        return add_selected(previous_mask, selected)

    @classmethod
    def create_from_config(cls, config: MaskerConfig) -> LocalMasker:
        """See `ResearchMasker.create_from_config`."""
        return cls(require_config(config, LocalMaskerConfig))
