"""Quest on the device."""

from __future__ import annotations

import numpy as np
import torch

from sparse_attention_hub.sparse_attention.research_attention.maskers.fixed.implementations.quest_top_k import (  # noqa: E501
    MIN_PAGES,
)
from vllm_sparse_plugin.paged.device.maskers.base import device_masker_of
from vllm_sparse_plugin.paged.device.maskers.top_k import DeviceTopKMasker
from vllm_sparse_plugin.paged.device.queries import DeviceQueries
from vllm_sparse_plugin.paged.maskers.quest_top_k import PagedQuestTopKMasker
from vllm_sparse_plugin.paged.sizes import page_counts
from vllm_sparse_plugin.paged.triton_kernels.page_scores import score_pages


@device_masker_of(PagedQuestTopKMasker)
class DeviceQuestTopKMasker(DeviceTopKMasker):
    """See `QuestTopKMasker`."""

    def counts(self, lengths: np.ndarray) -> np.ndarray:
        """See `DeviceTopKMasker.counts`."""
        return page_counts(lengths, self.config.heavy_size, self.page_size, MIN_PAGES)

    def score(self, queries: DeviceQueries, scores: torch.Tensor) -> None:
        """See `DeviceTopKMasker.score`."""
        (bounds,) = self.paged.indices
        cache, batch = queries.cache, queries.batch
        score_pages(
            queries.query,
            cache.kv_cache,
            cache.indices[bounds].place,
            cache.indices[bounds].index.record_bytes(self.shape),
            self.page_size,
            self.config.label_bits,
            batch.block_table,
            batch.rows,
            batch.lengths,
            scores,
        )
