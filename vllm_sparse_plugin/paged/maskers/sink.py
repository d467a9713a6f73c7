"""Sink masker on pages: the first keys."""

from __future__ import annotations

import numpy as np

from sparse_attention_hub.sparse_attention.research_attention.maskers.fixed import SinkMaskerConfig
from vllm_sparse_plugin.paged.maskers.base import PagedMasker, PagedQueries, counterpart_of


@counterpart_of(SinkMaskerConfig)
class PagedSinkMasker(PagedMasker):
    """See `SinkMasker`."""

    def select(self, queries: PagedQueries) -> None:
        """See `PagedMasker.select`."""
        ends = queries.sizes(self.config.sink_size)
        queries.add_range(np.zeros_like(ends), ends)
