"""Oracle top-p on pages: it reads every key, to be the measure of the others."""

from __future__ import annotations

from typing import ClassVar

from sparse_attention_hub.sparse_attention.research_attention.maskers.fixed import (
    OracleTopPMaskerConfig,
)
from vllm_sparse_plugin.paged.kernels.key_scores import score_keys
from vllm_sparse_plugin.paged.kernels.mass_selection import flag_mass
from vllm_sparse_plugin.paged.maskers.base import PagedMasker, PagedQueries, counterpart_of


@counterpart_of(OracleTopPMaskerConfig)
class PagedOracleTopPMasker(PagedMasker):
    """See `OracleTopPMasker`."""

    reads_every_key: ClassVar[bool] = True

    @property
    def needs_query_heads(self) -> bool:
        """Each query head has shares of its own."""
        return True

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
        flag_mass(
            queries.scores, self.config.top_p, queries.scaling, queries.lengths, queries.flags
        )
