"""Adaptive sampling masker (vAttention): as large a sample as the wanted accuracy needs.

Desai et al. 2025, "vAttention: Verified Sparse Attention": with probability at least 1 - delta the
estimated softmax denominator is within a relative error of epsilon, by the central limit theorem
and a variance that a small base sample measures. Departures from the field's API, each because the
stated probability would not hold otherwise:

- samples are drawn without replacement and only from keys that nothing selected yet;
- the base sample is kept: its keys are read anyway, so they count with certainty, and the rest is
  sampled from what remains. Given the base sample the estimate is then exactly unbiased;
- the quantile is two-sided, since errors of either sign count;
- visible keys outside the sampled range are selected, not forgotten.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import NormalDist
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
from sparse_attention_hub.sparse_attention.research_attention.maskers.fixed.base import largest
from sparse_attention_hub.sparse_attention.research_attention.maskers.head_groups import (
    any_of_groups,
    check_head_granularity,
    largest_of_groups,
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
    add_range,
    add_weighted,
    is_single_row,
    pooled_rows,
    rows_of,
)
from sparse_attention_hub.sparse_attention.research_attention.maskers.sizes import (
    Size,
    check_not_too_large,
    first_visible,
)
from sparse_attention_hub.sparse_attention.utils.kv_utils import grouped_scores
from sparse_attention_hub.sparse_attention.utils.mask import Mask
from sparse_attention_hub.sparse_attention.utils.row_attention import row_scores
from sparse_attention_hub.sparse_attention.visibility import add_bias, visible_keys


def _search_space() -> dict[str, Any]:
    return {
        "base_rate_sampling": {"grid_search": [0.01, 0.02, 0.03]},
        "epsilon": {"grid_search": [0.05, 0.1, 0.2, 0.3]},
        "delta": {"grid_search": [0.05, 0.1, 0.2, 0.3]},
    }


@dataclass(frozen=True)
class AdaptiveSamplingMaskerConfig(SamplingMaskerConfig):
    """The accuracy that is wanted, and where keys are sampled.

    Attributes:
        base_rate_sampling: Keys of the base sample: an integer >= 0, or a share in [0, 1) of the
            keys to sample from; at least 2 keys. 0 = nothing is sampled, and nothing added.
        epsilon: Largest relative error of the denominator, in (0, 1).
        delta: Probability, in (0, 1), with which it may be larger.
        init_offset: Leading visible keys that are read with certainty: an integer >= 0, or a share
            in [0, 1].
        local_offset: Trailing ones, likewise.
        search_space: For tuners; no part of what the masker does.
        seed: Of the sample, an integer in [0, 2**63).
        head_granularity: "query_head": each query head has a sample of its own. "kv_head": the
            query heads that share a KV head have one sample together; see `AdaptiveSamplingMasker`.
    """

    base_rate_sampling: Size
    epsilon: float
    delta: float
    init_offset: Size
    local_offset: Size
    search_space: dict[str, Any] = field(default_factory=_search_space, compare=False)
    seed: int = 42
    head_granularity: str = "query_head"

    def __post_init__(self) -> None:
        """Checks the fields.

        Raises:
            ValueError: Names the field, its value and what is allowed.
        """
        share = "an integer >= 0 or a float in [0, 1)"
        _check(self, "base_rate_sampling", share, True, lambda value: 0 <= value < 1)
        for name in ("epsilon", "delta"):
            _check(self, name, "a float in (0, 1)", False, lambda value: 0 < value < 1)
        for name in ("init_offset", "local_offset"):
            share = "an integer >= 0 or a float in [0, 1]"
            _check(self, name, share, True, lambda value: 0 <= value <= 1)
        checked_seed(self.seed)
        check_head_granularity(self.head_granularity)


def _check(
    config: AdaptiveSamplingMaskerConfig,
    name: str,
    allowed: str,
    takes_integers: bool,
    is_share: Callable[[float], bool],
) -> None:
    value: Any = getattr(config, name)
    is_valid = False
    if isinstance(value, bool):  # an int to Python, a mistake here
        pass
    elif isinstance(value, numbers.Integral):
        value = int(value)
        is_valid = takes_integers and value >= 0
        if is_valid:
            check_not_too_large(name, value)
    elif isinstance(value, numbers.Real):
        value = float(value)
        is_valid = is_share(value)
    if not is_valid:
        raise ValueError(f"{name} must be {allowed}, got {value!r}")
    object.__setattr__(config, name, value)


@MaskerRegistry.register(AdaptiveSamplingMaskerConfig)
class AdaptiveSamplingMasker(SamplingMasker):
    """Samples until the denominator is known to within epsilon, with probability 1 - delta.

    Of the R visible keys in range that nothing selected, n_b form the base sample: read with
    certainty. From their standard deviation s of `exp(score)` and their estimate D of the whole
    denominator follow the keys to sample from the other R' = R - n_b,

        n0 = (z * s * R' / (epsilon * D))**2,  n = n0 / (1 + n0 / R'),  n_b <= n <= R'

    with z the two-sided normal quantile of delta; the second formula is the correction for drawing
    without replacement. Each sampled key has the probability n / R'.

    The bound rests on the normal approximation and on the base sample's deviation. Put a
    heavy-hitter masker first, as the paper does: a few keys that hold nearly everything, none of
    them in the base sample, break it, and no sample that leaves keys out could know of them.

    A small base sample misses the bound more often than delta, since it seldom has the rare large
    `exp(score)` in it, and then finds the deviation, and so n, too small. With epsilon = delta =
    0.1, behind the exact top 2 % of 2,000 keys with normal scores of deviation 1 (of 2), 40 % (60)
    of queries missed it with a base of 2 keys, 17 % (29) with 10, 13 % (20) with 20, 11 % (15)
    with 50.

    Query heads that sample together first take over what any of them has selected, with the largest
    of its probabilities. They share the base sample, drawn with the random numbers of their first;
    each computes n from its own scores, and the largest n is drawn for all of them, so that the
    bound holds for each.
    """

    facts: ClassVar[MaskerFacts] = MaskerFacts(
        paper="vAttention, Desai et al. 2025",
        is_paged=True,
    )

    def __init__(self, config: AdaptiveSamplingMaskerConfig) -> None:
        """Keeps the configuration.

        Args:
            config: Of this masker.
        """
        super().__init__(config)
        self.base_rate_sampling = config.base_rate_sampling
        self.epsilon = config.epsilon
        self.delta = config.delta
        self.init_offset = config.init_offset
        self.local_offset = config.local_offset
        self.seed = config.seed
        self.head_granularity = config.head_granularity
        self.delta_ppf = NormalDist().inv_cdf(1 - config.delta / 2)

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
        if previous_mask.is_full_mask() or self.base_rate_sampling == 0:
            return previous_mask
        num_keys, heads, device = keys.shape[2], queries.shape[1], queries.device
        units = selecting_units(self.head_granularity, heads, keys.shape[1])
        layer = self.cache_of_layer(sparse_meta_data, kwargs)[1]
        # The number of sampled keys is measured; listing them needs it on the host, which is free
        # on a CPU alone.
        if device.type == "cpu" and is_single_row(previous_mask, attention_mask):
            mask = pooled_rows(previous_mask, units)
            return self._add_to_row(mask, queries, keys, scaling, layer, units)
        visible = visible_keys(attention_mask, num_keys)
        if visible is None:
            visible = torch.ones(1, 1, 1, num_keys, dtype=torch.bool, device=device)
        counts = visible.sum(dim=-1, keepdim=True)
        certain = visible & ~self._in_range(visible, counts)
        mask = pooled_mask(add_selected(previous_mask, certain), units)
        weights = mask.get_dense_mask()
        unselected = unselected_keys(mask, attention_mask)
        residual = any_of_groups(unselected, units)
        size = residual.sum(dim=-1, keepdim=True)
        first = first_visible(attention_mask, num_keys)
        order = -uniform_per_key(
            self.seed, layer, heads, counts - 1, num_keys, heads // units, first
        ).expand_as(residual)

        base_size = self._base_size(size)
        base = largest(order, residual, base_size, num_keys)

        logits = add_bias(grouped_scores(queries, keys) * scaling, attention_mask)
        logits = logits.masked_fill(~visible, -torch.inf)
        top = logits.amax(dim=-1, keepdim=True)
        mass = torch.exp(logits - top.masked_fill(top == -torch.inf, 0)).double()
        rest = residual & ~base
        weights = weights.double()
        static = mass / weights.masked_fill(weights == 0, torch.inf)
        of_heads = [per_query_head(part, heads) for part in (base, base_size, size)]
        budgets = self._budget(static.sum(dim=-1, keepdim=True), mass, *of_heads)
        budget = largest_of_groups(budgets, units)
        sampled = largest(order, rest, budget, num_keys)
        probability = budget / (size - base_size).clamp(min=1)
        return add_sampled(
            add_selected(mask, of_heads[0] & unselected),
            per_query_head(sampled, heads) & unselected,
            per_query_head(probability, heads),
        )

    def _in_range(self, visible: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """Which keys are neither leading nor trailing ones, by their rank among the visible."""

        def resolved(offset: Size) -> torch.Tensor | int:
            return (counts.double() * offset).floor() if isinstance(offset, float) else offset

        rank = visible.cumsum(dim=-1) - 1
        return (rank >= resolved(self.init_offset)) & (rank < counts - resolved(self.local_offset))

    def _base_size(self, size: torch.Tensor) -> torch.Tensor:
        """Keys of the base sample, n_b, out of R; both int64 `(B, H, Q, 1)`."""
        if isinstance(self.base_rate_sampling, float):
            base_size = (size.double() * self.base_rate_sampling).floor().long().clamp(min=2)
        else:
            base_size = torch.full_like(size, max(2, self.base_rate_sampling))
        return torch.minimum(base_size, size)

    def _add_to_row(
        self,
        previous_mask: Mask,
        queries: torch.Tensor,
        keys: torch.Tensor,
        scaling: float,
        layer: int,
        units: int,
    ) -> Mask:
        """The same by index, for one query that sees every key (see `single_row`).

        It reads the keys that are selected and the base sample, and no others.

        Args:
            previous_mask: `(B, H, 1, K)`, by index; the same for all query heads of a unit.
            queries: `(B, H, 1, D)`.
            keys: `(B, G, K, D)`.
            scaling: Of the scores.
            layer: Index of the attention layer.
            units: Who sample, query heads or KV heads.
        """
        heads, num_keys = queries.shape[1], keys.shape[2]
        start, stop = self._range(num_keys)
        mask = add_range(add_range(previous_mask, 0, start), stop, num_keys)
        rows = rows_of(mask)
        order, size = unselected_in_random_order(mask, self.seed, layer, units)
        base_size = self._base_size(size)
        num_base = int(base_size.max())
        # More than the base sample, so that most often the whole sample is drawn already.
        ranked = order.topk(min(4 * num_base, num_keys), dim=-1).indices
        drawn = per_query_head(ranked[..., :num_base], heads)
        base_size, size = (per_query_head(count, heads) for count in (base_size, size))
        is_base = torch.arange(drawn.shape[-1]) < base_size
        read = torch.cat([rows[0], drawn], dim=-1)
        logits = row_scores(queries, keys, read) * scaling
        is_read = torch.cat([rows[1] > 0, is_base], dim=-1)
        logits = logits.masked_fill(~is_read, -torch.inf)
        top = logits.amax(dim=-1, keepdim=True) if read.shape[-1] else torch.zeros_like(size)
        mass = torch.exp(logits - top.masked_fill(top == -torch.inf, 0)).double()
        num_static = rows[0].shape[-1]
        static, base_mass = mass[..., :num_static], mass[..., num_static:]
        weights = rows[1].double()
        static = static / weights.masked_fill(weights == 0, torch.inf)
        total = static.sum(dim=-1, keepdim=True)
        budgets = self._budget(total, base_mass, is_base, base_size, size)
        budget = per_query_head(largest_of_groups(budgets, units), heads)
        num_drawn = int((base_size + budget).max())
        if num_drawn > ranked.shape[-1]:
            ranked = order.topk(num_drawn, dim=-1).indices
        drawn = per_query_head(ranked[..., :num_drawn], heads)
        place = torch.arange(drawn.shape[-1])
        probability = budget / (size - base_size).clamp(min=1)
        probabilities = torch.where(place < base_size, 1.0, probability)
        return add_weighted(mask, drawn, probabilities * (place < base_size + budget))

    def _range(self, num_keys: int) -> tuple[int, int]:
        """Where keys are sampled, of `num_keys` visible ones; as `_in_range`."""

        def resolved(offset: Size) -> int:
            return min(int(num_keys * offset) if isinstance(offset, float) else offset, num_keys)

        start = resolved(self.init_offset)
        return start, max(start, num_keys - resolved(self.local_offset))

    def _budget(
        self,
        static: torch.Tensor,
        mass: torch.Tensor,
        base: torch.Tensor,
        base_size: torch.Tensor,
        size: torch.Tensor,
    ) -> torch.Tensor:
        """Keys to sample beyond the base sample, int64 `(B, H, Q, 1)`; see the class.

        Args:
            static: The estimate of the denominator from what is selected before, `(B, H, Q, 1)`.
            mass: `exp(score)` up to a row constant, float64 `(B, H, Q, n)`.
            base: Which of these n keys form the base sample.
            base_size: n_b.
            size: R.
        """
        base_mass = torch.where(base, mass, 0.0)
        count = base_size.clamp(min=1)
        mean = base_mass.sum(dim=-1, keepdim=True) / count
        squares = torch.where(base, (mass - mean) ** 2, 0.0).sum(dim=-1, keepdim=True)
        deviation = (squares / (base_size - 1).clamp(min=1)).sqrt()
        denominator = static + mean * size
        rest = (size - base_size).double()
        tolerated = (self.epsilon * denominator).clamp(min=torch.finfo(torch.float64).tiny)
        wanted = (self.delta_ppf * deviation * rest / tolerated) ** 2
        # Without replacement: the variance falls to 0 as the sample takes everything.
        corrected = wanted / (1 + wanted / rest.clamp(min=1))
        return torch.minimum(torch.maximum(corrected.ceil().long(), base_size), size - base_size)

    @classmethod
    def create_from_config(cls, config: MaskerConfig) -> AdaptiveSamplingMasker:
        """See `ResearchMasker.create_from_config`."""
        return cls(require_config(config, AdaptiveSamplingMaskerConfig))
