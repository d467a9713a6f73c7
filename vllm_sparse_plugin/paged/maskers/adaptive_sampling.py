"""Adaptive sampling (vAttention) on pages: it reads the keys that are selected and its sample."""

from __future__ import annotations

from statistics import NormalDist
from typing import Any, ClassVar

import numpy as np

from sparse_attention_hub.sparse_attention.research_attention.maskers.sampling import (
    AdaptiveSamplingMaskerConfig,
)
from vllm_sparse_plugin.paged.kernels.sampling import sample_adaptively
from vllm_sparse_plugin.paged.kernels.selected_mass import sum_selected_mass
from vllm_sparse_plugin.paged.kernels.tiles import PART
from vllm_sparse_plugin.paged.layout import BlockShape
from vllm_sparse_plugin.paged.maskers.base import (
    PagedMasker,
    PagedQueries,
    Unsupported,
    counterpart_of,
)
from vllm_sparse_plugin.paged.token_lists import TokenLists


def base_sample(config: AdaptiveSamplingMaskerConfig) -> tuple[int, float]:
    """Keys of a base sample, 0 = by its share, and that share; as kernels take them."""
    base = config.base_rate_sampling
    return (0, base) if isinstance(base, float) else (max(2, base), 0.0)


@counterpart_of(AdaptiveSamplingMaskerConfig)
class PagedAdaptiveSamplingMasker(PagedMasker):
    """See `AdaptiveSamplingMasker`."""

    samples: ClassVar[bool] = True

    def __init__(self, config: Any, shape: BlockShape) -> None:
        """Looks up the quantile.

        Raises:
            Unsupported: Without a base sample nothing is sampled, for which there is no kernel.
        """
        if config.base_rate_sampling == 0:
            raise Unsupported("adaptive_sampling: a base_rate_sampling of 0 has no kernel")
        super().__init__(config, shape)
        self._quantile = NormalDist().inv_cdf(1 - config.delta / 2)

    def select(self, queries: PagedQueries) -> None:
        """See `PagedMasker.select`."""
        config = self.config
        lengths = queries.lengths.astype(np.int64)
        begins = queries.sizes(config.init_offset)
        ends = np.maximum(begins, lengths - queries.sizes(config.local_offset))
        queries.add_range(np.zeros_like(begins), begins)
        queries.add_range(ends, lengths)
        with queries.as_units_of(config.head_granularity) as units:
            self._sample(units)

    def _sample(self, queries: PagedQueries) -> None:
        config, shape = self.config, self.shape
        lists = TokenLists.of(
            queries.flags,
            queries.probability,
            queries.lengths,
            shape.num_heads,
            shape.num_kv_heads,
            is_sampled=False,
        )
        parts = -(-int(lists.counts.max()) // PART)
        top = np.empty((queries.query.shape[0] * shape.num_heads, max(1, parts)), np.float32)
        mass = np.empty(top.shape, np.float64)
        cache = (
            queries.query,
            queries.cache.elements,
            shape.kind,
            shape.block_size,
            queries.block_table,
            queries.rows,
        )
        sum_selected_mass(
            *cache, lists.tokens, lists.log_weights, lists.counts, queries.scaling, top, mass
        )
        base_sizes = np.zeros(len(queries.flags), np.int64)
        sample_adaptively(
            *cache,
            queries.lengths,
            queries.scaling,
            *base_sample(config),
            config.epsilon,
            self._quantile,
            config.seed,
            queries.cache.layer_index,
            top,
            mass,
            queries.flags,
            queries.probability,
            base_sizes,
        )
        for read in (lists.counts, base_sizes):
            queries.keys_scored += read.reshape(len(queries.lengths), -1).sum(axis=1)
