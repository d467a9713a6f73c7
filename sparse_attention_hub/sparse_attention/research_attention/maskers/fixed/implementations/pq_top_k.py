"""PQCache masker: keys ranked by scores that a product quantiser of them gives.

Zhang et al. 2024, "PQCache: Product Quantization-based KVCache for Long Context LLM Inference",
section 3: keys are cut into sub-vectors, k-means gives each sub-space a codebook, and a query's
score with a key is the sum of its dot products with the key's centroids. The codebook is learned
from a prefix of the keys (see `key_prefix`; the paper takes the prompt, which a chunked prefill or
a continued conversation does not tell apart); later keys get codes of it.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
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
from sparse_attention_hub.sparse_attention.research_attention.maskers.fixed.implementations.utils.common_utils import (  # noqa: E501
    check_integer_field,
)
from sparse_attention_hub.sparse_attention.research_attention.maskers.fixed.implementations.utils.lookup_scores import (  # noqa: E501
    lookup_scores,
)
from sparse_attention_hub.sparse_attention.research_attention.maskers.key_labels import (
    LabelsByLayer,
    labels_of_keys,
)
from sparse_attention_hub.sparse_attention.research_attention.maskers.key_prefix import (
    first_visible_keys,
    prefix_sizes,
)
from sparse_attention_hub.sparse_attention.utils.kv_utils import split_channels

MAX_TRAINING_KEYS = 4096
"""Keys that k-means sees: of longer prefixes evenly spaced ones, so that learning costs no more."""
_DISTANCES_ON_CPU, _DISTANCES_ELSEWHERE = 1 << 20, 1 << 26
"""Of keys to centroids, held at once: what a processor's cache holds (four times as fast as all of
them), or a small part of a device's memory."""


@dataclass(frozen=True)
class PQCacheConfig(TopKMaskerConfig):
    """How keys are quantised.

    Attributes:
        pq_sub_dim: Channels of a sub-vector; a divisor of the head size.
        pq_bits: Of a sub-vector's code, 1 to 8: 2**pq_bits centroids.
        kmeans_iterations: Of the codebook, 1 to 100.
    """

    json_name: ClassVar[str | None] = "pq_cache"

    pq_sub_dim: int
    pq_bits: int
    kmeans_iterations: int = 10

    def __post_init__(self) -> None:
        """Checks the fields.

        Raises:
            ValueError: Names the field, its value and what is allowed.
        """
        super().__post_init__()
        check_integer_field(self, "pq_sub_dim", 1)
        check_integer_field(self, "pq_bits", 1, 8)
        check_integer_field(self, "kmeans_iterations", 1, 100)


@MaskerRegistry.register(PQCacheConfig)
class PQCache(TopKMasker):
    """Ranks keys by the dot product of the query with the key's nearest centroids."""

    facts: ClassVar[MaskerFacts] = MaskerFacts(
        paper="PQCache, Zhang et al. 2024",
        state="codebook and codes",
        index_bytes="head size / pq_sub_dim · pq_bits / 8",
        is_paged=True,
    )

    def __init__(self, config: PQCacheConfig) -> None:
        """Keeps the configuration.

        Args:
            config: Of this masker.
        """
        super().__init__(config)
        self.pq_sub_dim = config.pq_sub_dim
        self.pq_bits = config.pq_bits
        self.kmeans_iterations = config.kmeans_iterations
        self._name = ("pq", config.pq_sub_dim, config.pq_bits, config.kmeans_iterations)

    def scores(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        attention_mask: torch.Tensor | None,
        sparse_meta_data: dict[Any, Any],
        layer_idx: int,
    ) -> torch.Tensor:
        """See `TopKMasker.scores`.

        Raises:
            ValueError: `pq_sub_dim` does not divide the head size.
        """
        head_size = keys.shape[3]
        if head_size % self.pq_sub_dim:
            raise ValueError(
                f"pq_sub_dim must divide the head size {head_size}, got {self.pq_sub_dim}"
            )
        parts = split_channels(queries.float(), self.pq_sub_dim)
        group = queries.shape[1] // keys.shape[1]
        scores: torch.Tensor | None = None
        for size, rows in prefix_sizes(attention_mask, keys.shape[2]):
            codebook = self._codebook(keys, attention_mask, size, sparse_meta_data, layer_idx)
            codes = labels_of_keys(
                sparse_meta_data,
                (*self._name, "codes"),
                layer_idx,
                keys,
                functools.partial(nearest_centroids, codebook=codebook),
                version=size,
            )
            books = codebook.repeat_interleave(group, dim=1)
            found = lookup_scores(torch.einsum("bhqms,bhmcs->bhqmc", parts, books), codes)
            scores = found if scores is None or rows is None else torch.where(rows, found, scores)
        assert scores is not None  # there is at least one prefix size
        return scores

    def _codebook(
        self,
        keys: torch.Tensor,
        attention_mask: torch.Tensor | None,
        size: int,
        sparse_meta_data: dict[Any, Any],
        layer_idx: int,
    ) -> torch.Tensor:
        """Centroids `(B, G, M, C, pq_sub_dim)` of the first `size` keys."""
        state = sparse_meta_data.setdefault((*self._name, "codebook"), LabelsByLayer())
        known = state.get(layer_idx)
        place = (size, keys.shape[0], keys.shape[1], keys.device)
        if known is None or known[0] != place:
            prefix = first_visible_keys(keys, attention_mask, size)
            book = learned_codebook(prefix, self.pq_sub_dim, self.pq_bits, self.kmeans_iterations)
            known = state[layer_idx] = (place, book)
        codebook: torch.Tensor = known[1]
        return codebook

    @classmethod
    def create_from_config(cls, config: MaskerConfig) -> PQCache:
        """See `ResearchMasker.create_from_config`."""
        return cls(require_config(config, PQCacheConfig))


def learned_codebook(
    keys: torch.Tensor, sub_dim: int, num_bits: int, iterations: int
) -> torch.Tensor:
    """Centroids by Lloyd's k-means, started from evenly spaced keys: no chance in it.

    Args:
        keys: `(B, G, n, D)`, to learn from: all of them, or `MAX_TRAINING_KEYS` that are evenly
            spaced.
        sub_dim: Channels of a sub-vector.
        num_bits: 2**num_bits centroids, or n if there are fewer keys.
        iterations: Of k-means; a centroid that no key is nearest to stays where it is.

    Returns:
        float32 `(B, G, D // sub_dim, C, sub_dim)`.
    """
    if keys.shape[2] > MAX_TRAINING_KEYS:
        keys = keys[:, :, training_keys(keys.shape[2], keys.device)]
    num_keys = keys.shape[2]
    parts = split_channels(keys.float(), sub_dim).transpose(2, 3)  # (B, G, M, n, sub_dim)
    size = min(2**num_bits, num_keys)
    starts = torch.arange(size, device=keys.device) * num_keys // size
    centroids = parts[:, :, :, starts]
    for _ in range(iterations):
        counts, sums = _sums_of(parts, _nearest(parts, centroids), size)
        centroids = torch.where(counts > 0, sums / counts.clamp(min=1), centroids)
    return centroids


def training_keys(count: int, device: torch.device) -> torch.Tensor:
    """Which of `count` keys a codebook is learned from, int64."""
    size = min(count, MAX_TRAINING_KEYS)
    return torch.arange(size, device=device) * count // size


def _sums_of(
    parts: torch.Tensor, nearest: torch.Tensor, size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each of `size` centroids, how many sub-vectors are nearest to it, and their sums.

    Args:
        parts: `(..., n, s)`.
        nearest: `(..., n)`, see `_nearest`.
        size: Centroids, C.

    Returns:
        `(..., C, 1)` and `(..., C, s)`, float32.
    """
    if parts.device.type != "cpu":
        return _products_of(parts, nearest, size)
    shape, places = (*parts.shape[:-2], size), nearest.unsqueeze(-1)
    counts = parts.new_zeros(*shape, 1)
    counts.scatter_add_(-2, places, torch.ones_like(places, dtype=counts.dtype))
    sums = parts.new_zeros(*shape, parts.shape[-1])
    return counts, sums.scatter_add_(-2, places.expand_as(parts), parts)


def _products_of(
    parts: torch.Tensor, nearest: torch.Tensor, size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`_sums_of` where scattering adds in any order, and would give another codebook each time."""
    shape = (*parts.shape[:-2], size)
    counts, sums = parts.new_zeros(*shape, 1), parts.new_zeros(*shape, parts.shape[-1])
    ids = torch.arange(size, device=parts.device)
    step = max(1, _DISTANCES_ELSEWHERE // sums[..., 0].numel())
    for some, own in zip(torch.split(nearest, step, -1), torch.split(parts, step, -2), strict=True):
        chosen = (some.unsqueeze(-2) == ids.unsqueeze(-1)).to(parts.dtype)  # (..., C, n)
        counts += chosen.sum(-1, keepdim=True)
        sums += chosen @ own
    return counts, sums


def nearest_centroids(keys: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """The codes of keys `(B, G, n, D)`: int32 `(B, G, n, M)`; the lower code wins ties."""
    parts = split_channels(keys.float(), codebook.shape[-1]).transpose(2, 3)
    return _nearest(parts, codebook).transpose(2, 3).to(torch.int32).contiguous()


def _nearest(parts: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """Indices `(..., n)` of the centroids `(..., C, s)` nearest to `(..., n, s)`."""
    lengths = centroids.square().sum(-1).unsqueeze(-2)
    limit = _DISTANCES_ON_CPU if parts.device.type == "cpu" else _DISTANCES_ELSEWHERE
    nearest = []
    for some in torch.split(parts, max(1, limit // centroids[..., 0].numel()), dim=-2):
        # |x - c|^2 without |x|^2, which is the same for every centroid.
        distances = lengths - 2 * some @ centroids.transpose(-1, -2)
        nearest.append(distances.argmin(dim=-1))
    return nearest[0] if len(nearest) == 1 else torch.cat(nearest, dim=-1)
