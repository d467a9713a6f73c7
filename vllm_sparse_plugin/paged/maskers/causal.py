"""Causal masker on pages: it selects nothing."""

from __future__ import annotations

from sparse_attention_hub.sparse_attention.research_attention.maskers.fixed import FixedMaskerConfig
from vllm_sparse_plugin.paged.maskers.base import PagedMasker, PagedQueries, counterpart_of


@counterpart_of(FixedMaskerConfig)
class PagedCausalMasker(PagedMasker):
    """See `CausalMasker`."""

    def select(self, queries: PagedQueries) -> None:
        """See `PagedMasker.select`."""
