"""Oracle top-k on pages: it reads every key, to be the measure of the others."""

from __future__ import annotations

from typing import ClassVar

from sparse_attention_hub.sparse_attention.research_attention.maskers.fixed import OracleTopKConfig
from vllm_sparse_plugin.paged.kernels.key_scores import score_keys
from vllm_sparse_plugin.paged.maskers.base import PagedMasker, PagedQueries, counterpart_of


@counterpart_of(OracleTopKConfig)
class PagedOracleTopKMasker(PagedMasker):
    """See `OracleTopKMasker`."""

    reads_every_key: ClassVar[bool] = True

    def select(self, queries: PagedQueries) -> None:
        """See `PagedMasker.select`."""
        score_keys(
            queries.query,
            queries.cache.elements,
            self.shape.kind,
            self.shape.block_size,
            queries.block_table,
            queries.rows,
            queries.lengths,
            queries.scores,
        )
        queries.select_all_within(self.config.heavy_size)
        queries.add_largest(1, self.config.head_granularity, queries.sizes(self.config.heavy_size))
