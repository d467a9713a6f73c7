"""Quest on pages: it reads the bounds of every page, and the keys of the best ones."""

from __future__ import annotations

from typing import Any

from sparse_attention_hub.sparse_attention.research_attention.maskers.fixed.implementations.quest_top_k import (  # noqa: E501
    MIN_PAGES,
    QuestTopKMaskerConfig,
)
from vllm_sparse_plugin.paged.kernels.page_scores import score_pages
from vllm_sparse_plugin.paged.layout import BlockIndex, BlockShape
from vllm_sparse_plugin.paged.maskers.base import (
    PagedMasker,
    PagedQueries,
    Unsupported,
    counterpart_of,
)
from vllm_sparse_plugin.paged.page_bounds import PageBounds
from vllm_sparse_plugin.paged.sizes import page_counts


@counterpart_of(QuestTopKMaskerConfig)
class PagedQuestTopKMasker(PagedMasker):
    """See `QuestTopKMasker`."""

    def __init__(self, config: Any, shape: BlockShape) -> None:
        """Looks whether blocks can hold the bounds."""
        super().__init__(config, shape)
        self._bounds = PageBounds(config.page_size, config.label_bits)
        reason = self._bounds.reason_against(shape)
        if reason is not None:
            raise Unsupported(f"quest_top_k: {reason}")

    @property
    def indices(self) -> tuple[BlockIndex, ...]:
        """See `PagedMasker.indices`."""
        return (self._bounds,)

    def select(self, queries: PagedQueries) -> None:
        """See `PagedMasker.select`."""
        cache, page_size = queries.cache, self.config.page_size
        score_pages(
            queries.query,
            cache.elements,
            self.shape.kind,
            cache.records,
            cache.layout.place_of(self._bounds),
            self._bounds.record_bytes(self.shape),
            self.shape.block_size,
            page_size,
            self.config.label_bits,
            queries.block_table,
            queries.rows,
            queries.lengths,
            queries.scores,
        )
        counts = page_counts(queries.lengths, self.config.heavy_size, page_size, MIN_PAGES)
        queries.select_all_within(self.config.heavy_size)
        queries.add_largest(page_size, self.config.head_granularity, counts)
