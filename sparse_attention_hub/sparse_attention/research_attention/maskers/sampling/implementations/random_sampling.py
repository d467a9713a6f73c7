"""Random sampling masker: a uniform sample of the keys that nothing else selected."""

from __future__ import annotations

import numbers
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from sparse_attention_hub.sparse_attention.research_attention.maskers.base import (
    MaskerConfig,
    MaskerFacts,
    MaskerRegistry,
    require_config,
    unselected_keys,
)
from sparse_attention_hub.sparse_attention.research_attention.maskers.fixed.base import largest
from sparse_attention_hub.sparse_attention.research_attention.maskers.head_groups import (
    any_of_groups,
    check_head_granularity,
    per_query_head,
    selecting_units,
)
from sparse_attention_hub.sparse_attention.research_attention.maskers.sampling.base import (
    SamplingMasker,
    SamplingMaskerConfig,
    add_sampled,
    checked_seed,
    pooled_mask,
    unselected_in_random_order,
)
from sparse_attention_hub.sparse_attention.research_attention.maskers.sampling.counter_random import (  # noqa: E501
    uniform_per_key,
)
from sparse_attention_hub.sparse_attention.research_attention.maskers.single_row import (
    add_weighted,
    is_single_row,
    pooled_rows,
)
from sparse_attention_hub.sparse_attention.research_attention.maskers.sizes import (
    first_visible,
    visible_counts,
)
from sparse_attention_hub.sparse_attention.utils.mask import Mask


@dataclass(frozen=True)
class RandomSamplingMaskerConfig(SamplingMaskerConfig):
    """How many keys are sampled.

    Attributes:
        sampling_rate: Share, in (0, 1], of the visible keys that were not selected before; rounded
            down, but at least one key.
        seed: Of the sample, an integer in [0, 2**63).
        head_granularity: "query_head": each query head has a sample of its own. "kv_head": the
            query heads that share a KV head have one sample together; see `RandomSamplingMasker`.
        search_space: For tuners; no part of what the masker does.
    """

    sampling_rate: float
    search_space: dict[str, Any] = field(default_factory=dict, compare=False)
    seed: int = 42
    head_granularity: str = "query_head"

    def __post_init__(self) -> None:
        """Checks the fields.

        Raises:
            ValueError: Names the field, its value and what is allowed.
        """
        rate: Any = self.sampling_rate
        is_number = isinstance(rate, numbers.Real) and not isinstance(rate, bool)
        if not is_number or not 0 < rate <= 1:
            raise ValueError(f"sampling_rate must be a number in (0, 1], got {rate!r}")
        object.__setattr__(self, "sampling_rate", float(rate))
        checked_seed(self.seed)
        check_head_granularity(self.head_granularity)


@MaskerRegistry.register(RandomSamplingMaskerConfig)
class RandomSamplingMasker(SamplingMasker):
    """A sample without replacement: n of a row's R remaining keys, each with probability n / R.

    The field's API draws with replacement and still weights by n / R, which leaves the estimate of
    the denominator short (at n = R by 37 %); without replacement n / R is the exact probability.

    Query heads that sample together first take over what any of them has selected, with the largest
    of its probabilities; then they draw one sample of what none of them has, with the random
    numbers of their first.
    """

    facts: ClassVar[MaskerFacts] = MaskerFacts(
        paper="(uniform)",
        is_paged=True,
    )

    def __init__(self, config: RandomSamplingMaskerConfig) -> None:
        """Keeps the configuration.

        Args:
            config: Of this masker.
        """
        super().__init__(config)
        self.sampling_rate = config.sampling_rate
        self.seed = config.seed
        self.head_granularity = config.head_granularity

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
        """See `ResearchMasker.add_mask`; `layer_idx` in `kwargs` keys the sample (default 0)."""
        if previous_mask.is_full_mask():
            return previous_mask
        num_keys, heads = keys.shape[2], queries.shape[1]
        if self.sampling_rate == 1.0 and previous_mask.is_empty_mask():
            return Mask.create_full_mask(previous_mask.shape, previous_mask.dtype, queries.device)
        layer = self.cache_of_layer(sparse_meta_data, kwargs)[1]
        units = selecting_units(self.head_granularity, heads, keys.shape[1])
        if is_single_row(previous_mask, attention_mask):
            return self._add_to_row(pooled_rows(previous_mask, units), layer, units)
        mask = pooled_mask(previous_mask, units)
        unselected = unselected_keys(mask, attention_mask)
        candidates = any_of_groups(unselected, units)
        # The n smallest of independent uniform numbers are a uniform sample of n keys.
        positions = torch.as_tensor(visible_counts(attention_mask, num_keys)) - 1
        numbers_of_keys = uniform_per_key(
            self.seed,
            layer,
            heads,
            positions.view(1, 1, 1, 1) if positions.ndim == 0 else positions,
            num_keys,
            heads // units,
            first_visible(attention_mask, num_keys),
        ).to(queries.device)
        remaining = candidates.sum(dim=-1, keepdim=True)
        count = self._count(remaining)
        at_most = max(1, int(num_keys * self.sampling_rate))
        selected = largest(-numbers_of_keys.expand_as(candidates), candidates, count, at_most)
        probability = count / remaining.clamp(min=1)
        sampled = per_query_head(selected, heads) & unselected
        return add_sampled(mask, sampled, per_query_head(probability, heads))

    def _count(self, remaining: torch.Tensor) -> torch.Tensor:
        """Keys to sample of those that remain, int64."""
        count = (remaining.double() * self.sampling_rate).floor().long().clamp(min=1)
        return torch.minimum(count, remaining)

    def _add_to_row(self, previous_mask: Mask, layer: int, units: int) -> Mask:
        """The same by index, for one query that sees every key (see `single_row`)."""
        _, heads, _, num_keys = previous_mask.shape
        order, remaining = unselected_in_random_order(previous_mask, self.seed, layer, units)
        count = self._count(remaining)
        drawn = order.topk(max(1, int(num_keys * self.sampling_rate)), dim=-1).indices
        is_drawn = torch.arange(drawn.shape[-1], device=drawn.device) < count
        probability = is_drawn * (count / remaining.clamp(min=1))
        return add_weighted(
            previous_mask, per_query_head(drawn, heads), per_query_head(probability, heads)
        )

    @classmethod
    def create_from_config(cls, config: MaskerConfig) -> RandomSamplingMasker:
        """See `ResearchMasker.create_from_config`."""
        return cls(require_config(config, RandomSamplingMaskerConfig))
