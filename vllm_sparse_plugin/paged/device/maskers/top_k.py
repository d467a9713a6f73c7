"""What maskers share that select the keys with the highest scores."""

from __future__ import annotations

from abc import abstractmethod

import numpy as np
import torch

from vllm_sparse_plugin.paged.device.maskers.base import DeviceMasker
from vllm_sparse_plugin.paged.device.queries import (
    DeviceQueries,
    pooling_workspace,
    radix_workspace,
    scores_buffer,
)
from vllm_sparse_plugin.paged.device.space import DeviceSpace
from vllm_sparse_plugin.paged.maskers.base import PagedMasker
from vllm_sparse_plugin.paged.sizes import ends_within, sizes_of


class DeviceTopKMasker(DeviceMasker):
    """Scores pages (of one key, unless the masker says otherwise), and selects the best."""

    page_size = 1

    def __init__(self, paged: PagedMasker, space: DeviceSpace) -> None:
        """See `DeviceMasker`."""
        super().__init__(paged, space)
        self.page_size = getattr(self.config, "page_size", 1)
        scores_buffer(space, self.page_size)
        radix_workspace(space)
        if self.config.head_granularity == "kv_head":
            pooling_workspace(space, self.page_size)

    def counts(self, lengths: np.ndarray) -> np.ndarray:
        """Pages to select, `[num_queries]`."""
        return sizes_of(lengths, self.config.heavy_size)

    def sizes(self, lengths: np.ndarray) -> list[np.ndarray]:
        """Pages to select; and for a size in keys, where a range of all keys begins and ends."""
        counts = [self.counts(lengths)]
        if isinstance(self.config.heavy_size, int):
            counts += [np.zeros_like(lengths), ends_within(lengths, self.config.heavy_size)]
        return counts

    @abstractmethod
    def score(self, queries: DeviceQueries, scores: torch.Tensor) -> None:
        """Writes a score per query head and page, see `DeviceQueries.scores`."""

    def select(self, queries: DeviceQueries, sizes: torch.Tensor) -> None:
        """See `DeviceMasker.select`."""
        scores = queries.scores(self.page_size)
        self.score(queries, scores)
        if len(sizes) > 1:
            queries.add_range(sizes[1], sizes[2])
        queries.add_largest(scores, self.page_size, self.config.head_granularity, sizes[0])
