"""Double Sparsity on pages: it reads a label of every key, and the best keys themselves."""

from __future__ import annotations

from typing import Any

import numpy as np

from sparse_attention_hub.sparse_attention.research_attention.maskers.fixed import (
    DoubleSparsityTopKMaskerConfig,
)
from vllm_sparse_plugin.paged.channel_labels import ChannelLabels
from vllm_sparse_plugin.paged.kernels.channel_labels import label_queries
from vllm_sparse_plugin.paged.kernels.label_scores import score_labels
from vllm_sparse_plugin.paged.layout import BlockIndex, BlockShape
from vllm_sparse_plugin.paged.maskers.base import (
    PagedMasker,
    PagedQueries,
    Unsupported,
    counterpart_of,
)


@counterpart_of(DoubleSparsityTopKMaskerConfig)
class PagedDoubleSparsityTopKMasker(PagedMasker):
    """See `DoubleSparsityTopKMasker`."""

    def __init__(self, config: Any, shape: BlockShape) -> None:
        """Looks whether blocks can hold the labels."""
        super().__init__(config, shape)
        self._labels = ChannelLabels(
            config.sorted_channel_file,
            config.channel_selection,
            config.group_factor,
            config.label_bits,
        )
        reason = self._labels.reason_against(shape)
        if reason is not None:
            raise Unsupported(f"double_sparsity_top_k: {reason}")

    @property
    def indices(self) -> tuple[BlockIndex, ...]:
        """See `PagedMasker.indices`."""
        return (self._labels,)

    def select(self, queries: PagedQueries) -> None:
        """See `PagedMasker.select`.

        Raises:
            ValueError: The channel file has nothing for the layer.
        """
        cache = queries.cache
        channels = self._labels.channels(cache.layer_index, self.shape)
        labels = np.empty((*queries.query.shape[:2], channels.shape[1]), np.float32)
        label_queries(queries.query, channels, self.config.label_bits, labels)
        score_labels(
            labels,
            cache.elements,
            self.shape.kind,
            cache.records,
            cache.layout.place_of(self._labels),
            self._labels.row_bytes(self.shape),
            self.config.label_bits,
            self._labels.rows_per_head(self.shape),
            self.shape.block_size,
            queries.block_table,
            queries.rows,
            queries.lengths,
            self.config.group_factor**0.5,
            queries.scores,
        )
        queries.select_all_within(self.config.heavy_size)
        queries.add_largest(1, self.config.head_granularity, queries.sizes(self.config.heavy_size))
