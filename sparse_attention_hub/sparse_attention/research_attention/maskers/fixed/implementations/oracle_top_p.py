"""Oracle top-p masker: the highest-scoring keys that together hold a share of the attention."""

from __future__ import annotations

import numbers
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from sparse_attention_hub.sparse_attention.research_attention.maskers.base import (
    MaskerConfig,
    MaskerFacts,
    MaskerRegistry,
    add_selected,
    require_config,
    unselected_keys,
)
from sparse_attention_hub.sparse_attention.research_attention.maskers.fixed.base import (
    FixedMasker,
    FixedMaskerConfig,
)
from sparse_attention_hub.sparse_attention.utils.kv_utils import grouped_scores
from sparse_attention_hub.sparse_attention.utils.mask import Mask
from sparse_attention_hub.sparse_attention.visibility import add_bias

_GRID = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98, 0.99]


def _search_space() -> dict[str, Any]:
    return {"top_p": {"grid_search": list(_GRID)}}


@dataclass(frozen=True)
class TopPMaskerConfig(FixedMaskerConfig):
    """Heavy hitters until they hold a share of the attention weight.

    Attributes:
        top_p: Of the weight of the keys not selected before, in [0, 1]. 0 = the heaviest key alone,
            1 = every key.
    """

    top_p: float

    def __post_init__(self) -> None:
        """Checks the share.

        Raises:
            ValueError: `top_p` is not a number in [0, 1].
        """
        value: Any = self.top_p
        is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
        if not is_number or not 0 <= value <= 1:
            raise ValueError(f"top_p must be a number in [0, 1], got {value!r}")
        object.__setattr__(self, "top_p", float(value))


class TopPMasker(FixedMasker):
    """A masker that selects by share of the attention weight."""

    def __init__(self, config: TopPMaskerConfig) -> None:
        """Keeps the configuration.

        Args:
            config: Of this masker.
        """
        super().__init__(config)
        self.top_p = config.top_p


@dataclass(frozen=True)
class OracleTopPMaskerConfig(TopPMaskerConfig):
    """How much of the attention weight is read beyond what other maskers selected.

    Attributes:
        search_space: For tuners; no part of what the masker does.
    """

    search_space: dict[str, Any] = field(default_factory=_search_space, compare=False)


@MaskerRegistry.register(OracleTopPMaskerConfig)
class OracleTopPMasker(TopPMasker):
    """Ranks keys by their exact attention weight; it reads every key to do so.

    Of the visible keys not yet selected, in falling order, it takes those until their sum exceeds
    `top_p` of the sum of all of them; keys as heavy as the last one taken are taken too. The share
    is of what remains, as in the field's API; Twilight (Lin et al. 2025, section 3) takes it of the
    whole, which is the same when this masker comes first.
    """

    facts: ClassVar[MaskerFacts] = MaskerFacts(
        paper="Twilight, Lin et al. 2025",
        is_by_index=False,
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
        if previous_mask.is_full_mask():
            return previous_mask
        if self.top_p == 1.0 and previous_mask.is_empty_mask():
            return Mask.create_full_mask(previous_mask.shape, previous_mask.dtype, queries.device)
        candidates = unselected_keys(previous_mask, attention_mask)
        logits = add_bias(grouped_scores(queries, keys) * scaling, attention_mask)
        logits = logits.masked_fill(~candidates, -torch.inf)
        ranked = logits.sort(dim=-1, descending=True).values
        weights = torch.exp(ranked - ranked[..., :1].masked_fill(ranked[..., :1] == -torch.inf, 0))
        # float64: at 128K keys a float32 sum would move the place where the share is reached.
        mass = weights.double().cumsum(dim=-1)
        reached = (mass <= self.top_p * mass[..., -1:]).sum(dim=-1, keepdim=True)
        last = torch.minimum(reached, candidates.sum(dim=-1, keepdim=True) - 1).clamp(min=0)
        selected = candidates & (logits >= ranked.gather(-1, last))
        return add_selected(previous_mask, selected)

    @classmethod
    def create_from_config(cls, config: MaskerConfig) -> OracleTopPMasker:
        """See `ResearchMasker.create_from_config`."""
        return cls(require_config(config, OracleTopPMaskerConfig))
