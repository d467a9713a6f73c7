"""MagicPig masker: keys sampled by the collisions of hash tables, weighted by their probability.

Chen et al. 2024, "MagicPIG: LSH Sampling for Efficient LLM Generation", section 4: L tables of K
sign bits of random projections; a key is sampled when it shares its bucket with the query in at
least two tables. With `u = 1 - angle / pi` the probability that one bit agrees, that happens with

    p = 1 - (1 - u**K)**L - L * u**K * (1 - u**K)**(L - 1)

and 1 / p weights the key (self-normalised importance sampling). Keys are centred first, which does
not change attention. Where the field's API differs from the paper (one collision suffices, an added
dimension for key norms), this follows the paper. The mean is that of a prefix, see `key_prefix`.

A projection within float noise of 0 may fall on either side: two correct implementations that round
differently agree on nearly all samples, not on every one.
"""

from __future__ import annotations

import math
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
from sparse_attention_hub.sparse_attention.research_attention.maskers.fixed.implementations.utils.common_utils import (  # noqa: E501
    check_integer_field,
)
from sparse_attention_hub.sparse_attention.research_attention.maskers.key_labels import (
    labels_of_keys,
)
from sparse_attention_hub.sparse_attention.research_attention.maskers.key_prefix import (
    first_visible_keys,
    prefix_sizes,
)
from sparse_attention_hub.sparse_attention.research_attention.maskers.random_projections import (
    bucket_codes,
    projections_of_layer,
)
from sparse_attention_hub.sparse_attention.research_attention.maskers.sampling.base import (
    SamplingMasker,
    SamplingMaskerConfig,
    add_sampled,
    checked_seed,
)
from sparse_attention_hub.sparse_attention.utils.kv_utils import grouped_scores
from sparse_attention_hub.sparse_attention.utils.mask import Mask

PACKINGS = ("int64", "float32")
_SMALLEST = 1e-12
"""Of probabilities: what is rarer is not sampled in practice, and 1 / p stays finite."""
_MOST_TABLES, _MOST_BITS = 1 << 10, 1 << 13
"""Far more than any use of them."""


def _search_space() -> dict[str, Any]:
    return {
        "lsh_l": {"grid_search": [16, 32, 64, 128]},
        "lsh_k": {"grid_search": [4, 8, 16, 32]},
    }


@dataclass(frozen=True)
class MagicPigConfig(SamplingMaskerConfig):
    """The hash tables.

    Attributes:
        lsh_l: Tables, at least 2, since a key needs two collisions; at most 1,024, and of 8,192
            bits altogether.
        lsh_k: Bits of a table, 1 to 62.
        center: Whether keys are centred before they are hashed.
        packing: "int64" or "float32", as in the field's API; signatures are integers with both.
        seed: Of the projections, an integer in [0, 2**63).
        search_space: For tuners; no part of what the masker does.
    """

    lsh_l: int
    lsh_k: int
    center: bool = True
    packing: str = "int64"
    seed: int = 42
    search_space: dict[str, Any] = field(default_factory=_search_space, compare=False)

    def __post_init__(self) -> None:
        """Checks the fields.

        Raises:
            ValueError: Names the field, its value and what is allowed.
        """
        check_integer_field(self, "lsh_k", 1, 62)
        check_integer_field(self, "lsh_l", 2, min(_MOST_TABLES, _MOST_BITS // self.lsh_k))
        if not isinstance(self.center, bool):
            raise ValueError(f"center must be true or false, got {self.center!r}")
        if self.packing not in PACKINGS:
            raise ValueError(f"packing must be one of {', '.join(PACKINGS)}, got {self.packing!r}")
        checked_seed(self.seed)


@MaskerRegistry.register(MagicPigConfig)
class MagicPig(SamplingMasker):
    """Samples keys in the direction of the query more often, and corrects for it by weight."""

    facts: ClassVar[MaskerFacts] = MaskerFacts(
        paper="MagicPIG, Chen et al. 2024",
        state="signatures and the mean",
        index_bytes="lsh_l · lsh_k / 8",
        is_by_index=False,
        is_paged=True,
    )
    needs_layer_idx: ClassVar[bool] = True

    def __init__(self, config: MagicPigConfig) -> None:
        """Keeps the configuration.

        Args:
            config: Of this masker.
        """
        super().__init__(config)
        self.lsh_l = config.lsh_l
        self.lsh_k = config.lsh_k
        self.center = config.center
        self.packing = config.packing
        self.seed = config.seed

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
        candidates = unselected_keys(previous_mask, attention_mask)
        collides = torch.zeros_like(candidates)
        probability = torch.ones(candidates.shape, dtype=torch.float64, device=keys.device)
        for size, rows in prefix_sizes(attention_mask if self.center else None, keys.shape[2]):
            mean = self._mean(keys, attention_mask, size)
            found = self._collisions(queries, keys, mean, size, cache, layer) >= 2
            chance = self.sampling_probability(queries, keys, mean)
            if rows is None:
                collides, probability = found, chance
            else:
                collides = torch.where(rows, found, collides)
                probability = torch.where(rows, chance, probability)
        return add_sampled(previous_mask, collides & candidates, probability)

    def _mean(
        self, keys: torch.Tensor, attention_mask: torch.Tensor | None, size: int
    ) -> torch.Tensor:
        """What is subtracted from keys, float32 `(B, G, 1, D)`."""
        if not self.center:
            return torch.zeros(*keys.shape[:2], 1, keys.shape[3], device=keys.device)
        return prefix_mean(first_visible_keys(keys, attention_mask, size))

    def _collisions(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        mean: torch.Tensor,
        size: int,
        sparse_meta_data: dict[Any, Any],
        layer: int,
    ) -> torch.Tensor:
        """In how many tables each key shares the query's bucket, `(B, H, Q, K)`."""
        batch, heads, num_queries, head_size = queries.shape
        kv_heads = keys.shape[1]
        shape = (kv_heads, head_size, self.lsh_l * self.lsh_k)
        projections = projections_of_layer(sparse_meta_data, self.seed, layer, shape)
        projections = projections.to(keys.device)

        def signatures(part: torch.Tensor) -> torch.Tensor:
            return bucket_codes(part, projections, self.lsh_k, mean)

        name = ("magic_pig", self.lsh_l, self.lsh_k, self.seed)
        version = size if self.center else None
        stored = labels_of_keys(sparse_meta_data, name, layer, keys, signatures, version=version)
        rows = queries.float().reshape(batch, kv_heads, -1, head_size)
        own = bucket_codes(rows, projections, self.lsh_k)
        count = torch.zeros(
            batch, kv_heads, rows.shape[2], keys.shape[2], dtype=torch.int32, device=keys.device
        )
        for table in range(self.lsh_l):
            count += own[..., table].unsqueeze(-1) == stored[..., table].unsqueeze(-2)
        return count.view(batch, heads, num_queries, keys.shape[2])

    def sampling_probability(
        self, queries: torch.Tensor, keys: torch.Tensor, mean: torch.Tensor
    ) -> torch.Tensor:
        """The p of the module's formula for each pair, float64 `(B, H, Q, K)`.

        Args:
            queries: `(B, H, Q, D)`.
            keys: `(B, G, K, D)`, before centring.
            mean: `(B, G, 1, D)`, subtracted from keys.
        """
        centred = keys.float() - mean
        queries = queries.float()
        lengths = queries.norm(dim=-1, keepdim=True) * torch.ones_like(queries[..., :1])
        key_lengths = centred.norm(dim=-1).unsqueeze(2)
        group = queries.shape[1] // keys.shape[1]
        norms = lengths * key_lengths.repeat_interleave(group, dim=1)
        cosine = grouped_scores(queries, centred) / norms.clamp(min=torch.finfo(norms.dtype).tiny)
        agree = 1 - torch.acos(cosine.double().clamp(-1, 1)) / math.pi
        hit = agree**self.lsh_k
        miss = 1 - hit
        chance = 1 - miss**self.lsh_l - self.lsh_l * hit * miss ** (self.lsh_l - 1)
        return chance.clamp(_SMALLEST, 1)

    @classmethod
    def create_from_config(cls, config: MaskerConfig) -> MagicPig:
        """See `ResearchMasker.create_from_config`."""
        return cls(require_config(config, MagicPigConfig))


def prefix_mean(prefix: torch.Tensor) -> torch.Tensor:
    """The mean of keys `(B, G, n, D)`, float32 `(B, G, 1, D)`."""
    return prefix.double().mean(dim=2, keepdim=True).float()
