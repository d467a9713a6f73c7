"""Double Sparsity on the device."""

from __future__ import annotations

import torch

from vllm_sparse_plugin.paged.device.indices.channel_labels import DeviceChannelLabels
from vllm_sparse_plugin.paged.device.maskers.base import device_masker_of
from vllm_sparse_plugin.paged.device.maskers.top_k import DeviceTopKMasker
from vllm_sparse_plugin.paged.device.queries import DeviceQueries, pooling_workspace
from vllm_sparse_plugin.paged.device.space import DeviceSpace
from vllm_sparse_plugin.paged.maskers.base import PagedMasker
from vllm_sparse_plugin.paged.maskers.double_sparsity_top_k import PagedDoubleSparsityTopKMasker
from vllm_sparse_plugin.paged.triton_kernels.channel_labels import QueryLabels, label_queries
from vllm_sparse_plugin.paged.triton_kernels.key_numbers import KeyRows
from vllm_sparse_plugin.paged.triton_kernels.label_numbers import can_number, number_labels
from vllm_sparse_plugin.paged.triton_kernels.label_products import KeyLabels
from vllm_sparse_plugin.paged.triton_kernels.label_scores import score_labels, weigh_labels


@device_masker_of(PagedDoubleSparsityTopKMasker)
class DeviceDoubleSparsityTopKMasker(DeviceTopKMasker):
    """See `DoubleSparsityTopKMasker`."""

    def __init__(self, paged: PagedMasker, space: DeviceSpace) -> None:
        """See `DeviceMasker`."""
        super().__init__(paged, space)
        (index,) = paged.indices
        self._count: int = index.num_channels(self.shape)  # type: ignore[attr-defined]
        sizes = (space.max_queries, self.shape.num_heads, self._count, self.config.label_bits)
        self._own = space.workspace(QueryLabels.of, *sizes)

    def score(self, queries: DeviceQueries, scores: torch.Tensor) -> None:
        """See `DeviceTopKMasker`.

        Raises:
            ValueError: The channel file has nothing for the layer.
        """
        held, batch = self._held(queries), queries.batch
        own = self._labels_of(queries, held)
        labels = self._labels_of_keys(queries, held)
        score_labels(own, labels, batch.block_table, batch.rows, batch.lengths, scores)

    def number(self, queries: DeviceQueries, scores: torch.Tensor, rows: KeyRows) -> None:
        """See `DeviceTopKMasker`: scores are stored only if that is less to move than labels.

        Raises:
            ValueError: The channel file has nothing for the layer.
        """
        held, batch = self._held(queries), queries.batch
        labels = self._labels_of_keys(queries, held)
        if not can_number(labels, rows.heads):
            super().number(queries, scores, rows)
            return
        own = self._labels_of(queries, held)
        weights = pooling_workspace(queries.space, self.page_size)
        compared = (own, labels, batch.block_table, batch.rows)
        weigh_labels(*compared, rows.lengths, queries.scaling, weights)
        number_labels(*compared, rows, queries.scaling, weights, scores)

    def _held(self, queries: DeviceQueries) -> DeviceChannelLabels:
        (key,) = self.paged.indices
        held = queries.cache.indices[key]
        assert isinstance(held, DeviceChannelLabels)
        return held

    def _labels_of(self, queries: DeviceQueries, held: DeviceChannelLabels) -> QueryLabels:
        if held.channels is None:
            raise ValueError(f"the channel file has no layer {queries.cache.layer_index}")
        own = self._own.first(len(queries.query))
        scale = self.config.group_factor**0.5
        label_queries(queries.query, held.channels, self.config.label_bits, scale, own)
        return own

    def _labels_of_keys(self, queries: DeviceQueries, held: DeviceChannelLabels) -> KeyLabels:
        index = held.index
        return KeyLabels(
            queries.cache.kv_cache,
            held.place,
            index.row_bytes(self.shape),
            self.config.label_bits,
            self._count,
            index.rows_per_head(self.shape),
        )
