"""Local masker on pages: the most recent keys."""

from __future__ import annotations

from sparse_attention_hub.sparse_attention.research_attention.maskers.fixed import LocalMaskerConfig
from vllm_sparse_plugin.paged.maskers.base import PagedMasker, PagedQueries, counterpart_of


@counterpart_of(LocalMaskerConfig)
class PagedLocalMasker(PagedMasker):
    """See `LocalMasker`."""

    def select(self, queries: PagedQueries) -> None:
        """See `PagedMasker.select`."""
        ends = queries.lengths.astype("int64")
        queries.add_range(ends - queries.sizes(self.config.window_size), ends)
