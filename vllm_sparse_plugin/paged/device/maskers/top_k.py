"""What maskers share that select the keys with the highest scores."""

from __future__ import annotations

from abc import abstractmethod

import numpy as np
import torch

from vllm_sparse_plugin.paged.device.maskers.base import DeviceMasker
from vllm_sparse_plugin.paged.device.queries import (
    DeviceQueries,
    pages_of,
    pooling_workspace,
    radix_workspace,
    scores_buffer,
)
from vllm_sparse_plugin.paged.device.space import DeviceSpace
from vllm_sparse_plugin.paged.maskers.base import PagedMasker
from vllm_sparse_plugin.paged.sizes import ends_within, sizes_of
from vllm_sparse_plugin.paged.triton_kernels.key_lists import list_numbered
from vllm_sparse_plugin.paged.triton_kernels.key_numbers import (
    KeyListsWorkspace,
    KeyRows,
    number_scores,
)
from vllm_sparse_plugin.paged.triton_kernels.lists import DeviceLists
from vllm_sparse_plugin.paged.triton_kernels.page_lists import list_pages
from vllm_sparse_plugin.paged.triton_kernels.pooling import weigh_scores
from vllm_sparse_plugin.paged.triton_kernels.row_selection import MOST_NUMBERS


class DeviceTopKMasker(DeviceMasker):
    """Scores pages (of one key, unless the masker says otherwise), and selects the best.

    Attributes:
        can_list: Whether `list_selected` can do all that there is to do after ranges of keys.
    """

    page_size = 1

    def __init__(self, paged: PagedMasker, space: DeviceSpace) -> None:
        """See `DeviceMasker`."""
        super().__init__(paged, space)
        self.page_size = getattr(self.config, "page_size", 1)
        scores_buffer(space, self.page_size)
        by_group = self.config.head_granularity == "kv_head"
        self._is_short = pages_of(space, self.page_size) <= MOST_NUMBERS
        is_grouped = self.shape.num_heads > self.shape.num_kv_heads
        self.can_list = by_group and (self._is_short or (self.page_size == 1 and is_grouped))
        self._key_lists: KeyListsWorkspace | None = None
        radix_workspace(space)
        if by_group:
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

    def number(self, queries: DeviceQueries, scores: torch.Tensor, rows: KeyRows) -> None:
        """Writes numbers of keys, see `key_numbers.number_scores`."""
        weights = pooling_workspace(queries.space, self.page_size)
        self.score(queries, scores)
        weigh_scores(scores, self.page_size, queries.scaling, rows.lengths, weights)
        number_scores(scores, rows, queries.scaling, weights)

    def select(self, queries: DeviceQueries, sizes: torch.Tensor) -> None:
        """See `DeviceMasker.select`."""
        scores = queries.scores(self.page_size)
        self.score(queries, scores)
        if len(sizes) > 1:
            queries.add_range(sizes[1], sizes[2])
        queries.add_largest(scores, self.page_size, self.config.head_granularity, sizes[0])

    def reserve_lists(self, space: DeviceSpace) -> None:
        """Asks for what `list_selected` needs besides."""
        if not self._is_short:
            rows = space.max_queries * self.shape.num_kv_heads
            self._key_lists = space.workspace(KeyListsWorkspace.of, rows)

    def list_selected(
        self,
        queries: DeviceQueries,
        ranges: torch.Tensor,
        sizes: torch.Tensor,
        lists: DeviceLists,
    ) -> None:
        """Writes the lists of what is in ranges or selected, and counts what is read of them.

        Args:
            queries: Of a layer and step.
            ranges: `[2 * num_ranges, num_queries]`, int32: see `page_lists.list_pages`.
            sizes: See `DeviceMasker.select`.
            lists: Written.
        """
        scores, lengths = queries.scores(self.page_size), queries.batch.lengths
        every = sizes[2] if len(sizes) > 1 else None
        kv_heads = self.shape.num_kv_heads
        if self._is_short:
            self.score(queries, scores)
            list_pages(
                scores,
                self.page_size,
                kv_heads,
                sizes[0],
                queries.scaling,
                lengths,
                ranges,
                every,
                lists,
                queries.reads,
            )
        else:
            assert self._key_lists is not None  # see `reserve_lists`
            heads = self.shape.num_heads // kv_heads
            rows = KeyRows(lengths, sizes[0], ranges, every, kv_heads, heads, self._key_lists)
            self.number(queries, scores, rows)
            list_numbered(scores, rows, lists, queries.reads)
