"""Bases of maskers that select with certainty, and the top-k rule they share."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from sparse_attention_hub.sparse_attention.research_attention.maskers.base import (
    MaskerConfig,
    ResearchMasker,
    add_selected,
    unselected_keys,
)
from sparse_attention_hub.sparse_attention.research_attention.maskers.head_groups import (
    any_of_groups,
    check_head_granularity,
    most_of_groups,
    per_query_head,
    pooled_scores,
    selecting_units,
)
from sparse_attention_hub.sparse_attention.research_attention.maskers.single_row import (
    add_top,
    is_single_row,
)
from sparse_attention_hub.sparse_attention.research_attention.maskers.sizes import (
    Size,
    checked_size,
    resolve_size,
    visible_counts,
)
from sparse_attention_hub.sparse_attention.utils.mask import Mask
from sparse_attention_hub.sparse_attention.visibility import add_bias, visible_keys


@dataclass(frozen=True)
class FixedMaskerConfig(MaskerConfig):
    """Base of configurations without sampling; by itself, the configuration of `CausalMasker`."""

    json_name: ClassVar[str | None] = "causal"


class FixedMasker(ResearchMasker):
    """A masker that selects each key with probability 1."""


@dataclass(frozen=True)
class TopKMaskerConfig(FixedMaskerConfig):
    """Heavy hitters by some score.

    Attributes:
        heavy_size: Keys beyond those already selected: a number, or a share of the keys that a
            query may see.
        head_granularity: "query_head": each query head selects for itself. "kv_head": the query
            heads that share a KV head select together, see `pooled_scores`; a server then
            loads for the group no more than for one of them.
    """

    heavy_size: Size
    head_granularity: str = field(default="query_head", kw_only=True)

    def __post_init__(self) -> None:
        """Checks the fields.

        Raises:
            ValueError: `heavy_size` is neither an integer >= 1 nor a float in (0, 1], or
                `head_granularity` is not one of `HEAD_GRANULARITIES`.
        """
        object.__setattr__(self, "heavy_size", checked_size("heavy_size", self.heavy_size))
        check_head_granularity(self.head_granularity)


class TopKMasker(FixedMasker):
    """Selects the `heavy_size` keys with the highest score that are visible and not yet selected.

    Equal scores: the lower position wins. Fewer candidates than `heavy_size`: all of them. Query
    heads that select together all get the same `heavy_size` keys, out of those that not all of them
    have.
    """

    def __init__(self, config: TopKMaskerConfig) -> None:
        """Keeps the configuration.

        Args:
            config: Of this masker.
        """
        super().__init__(config)
        self.heavy_size = config.heavy_size
        self.head_granularity = config.head_granularity

    @abstractmethod
    def scores(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        attention_mask: torch.Tensor | None,
        sparse_meta_data: dict[Any, Any],
        layer_idx: int,
    ) -> torch.Tensor:
        """What keys are ranked by; arguments as in `add_mask`.

        Returns:
            `(B, H, Q, K)`, in the units of unscaled dot products: the additive part of the
            attention mask is added to it.
        """

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
        cache, layer = self.cache_of_layer(sparse_meta_data, kwargs)
        if previous_mask.is_full_mask():
            return previous_mask
        num_keys = keys.shape[2]
        if isinstance(self.heavy_size, int) and num_keys <= self.heavy_size:
            return Mask.create_full_mask(previous_mask.shape, previous_mask.dtype, queries.device)
        heads, units = queries.shape[1], self._units(queries, keys)
        scores = self.scores(queries, keys, values, attention_mask, cache, layer)
        if scores.dtype == torch.float32 and is_single_row(previous_mask, attention_mask):
            count = resolve_size(self.heavy_size, num_keys)
            return add_top(previous_mask, pooled_scores(scores, units, scaling), count)
        visible = visible_keys(attention_mask, num_keys)
        scores = add_bias(scores, attention_mask)
        if visible is not None:
            scores = scores.masked_fill(~visible, -torch.inf)
        counts = most_of_groups(visible_counts(attention_mask, num_keys), units)
        selected = largest(
            pooled_scores(scores, units, scaling),
            any_of_groups(unselected_keys(previous_mask, attention_mask), units),
            resolve_size(self.heavy_size, counts),
            at_most=resolve_size(self.heavy_size, num_keys),
        )
        return add_selected(previous_mask, per_query_head(selected, heads))

    def _units(self, queries: torch.Tensor, keys: torch.Tensor) -> int:
        return selecting_units(self.head_granularity, queries.shape[1], keys.shape[1])


def largest(
    scores: torch.Tensor, candidates: torch.Tensor, count: int | torch.Tensor, at_most: int
) -> torch.Tensor:
    """The `count` candidates of each row with the highest scores; the lower position wins ties.

    Args:
        scores: `(..., K)`.
        candidates: Boolean, of the same shape.
        count: Per row, broadcastable to `(..., 1)`.
        at_most: A bound of `count` that is known without looking into a tensor.

    Returns:
        Boolean `(..., K)`.
    """
    at_most = min(at_most, scores.shape[-1])
    if at_most <= 0:
        return torch.zeros_like(candidates)
    scores = scores.masked_fill(~candidates, -torch.inf)
    available = candidates.sum(dim=-1, keepdim=True)
    count = torch.minimum(torch.as_tensor(count, device=scores.device), available)
    ranked = scores.topk(at_most, dim=-1).values
    # A row's lowest selected score: everything above it is in, and ties fill up from the left.
    bound = ranked.gather(-1, (count - 1).clamp(min=0))
    above = scores > bound
    tied = (scores == bound) & candidates
    room = count - above.sum(dim=-1, keepdim=True)
    return (above | (tied & (tied.cumsum(dim=-1) <= room))) & (count > 0)
