"""Double Sparsity on the device."""

from __future__ import annotations

import torch

from vllm_sparse_plugin.paged.device.indices.channel_labels import DeviceChannelLabels
from vllm_sparse_plugin.paged.device.maskers.base import device_masker_of
from vllm_sparse_plugin.paged.device.maskers.top_k import DeviceTopKMasker
from vllm_sparse_plugin.paged.device.queries import DeviceQueries
from vllm_sparse_plugin.paged.device.space import DeviceSpace
from vllm_sparse_plugin.paged.maskers.base import PagedMasker
from vllm_sparse_plugin.paged.maskers.double_sparsity_top_k import PagedDoubleSparsityTopKMasker
from vllm_sparse_plugin.paged.triton_kernels.channel_labels import label_queries
from vllm_sparse_plugin.paged.triton_kernels.label_scores import score_labels
from vllm_sparse_plugin.paged.triton_kernels.pooling import PoolingWorkspace


@device_masker_of(PagedDoubleSparsityTopKMasker)
class DeviceDoubleSparsityTopKMasker(DeviceTopKMasker):
    """See `DoubleSparsityTopKMasker`."""

    def __init__(self, paged: PagedMasker, space: DeviceSpace) -> None:
        """See `DeviceMasker`."""
        super().__init__(paged, space)
        (index,) = paged.indices
        count = index.num_channels(self.shape)  # type: ignore[attr-defined]
        self._labels = space.buffer(
            "query labels", space.max_queries, self.shape.num_heads, count, dtype=torch.float32
        )

    def score(self, queries: DeviceQueries, scores: torch.Tensor) -> None:
        """See `DeviceTopKMasker`; also for what it raises, `score_and_weigh`."""
        self._score(queries, scores, None)

    def score_and_weigh(
        self, queries: DeviceQueries, scores: torch.Tensor, weights: PoolingWorkspace
    ) -> None:
        """See `DeviceTopKMasker`: in one launch, before the scores have left a program.

        Raises:
            ValueError: The channel file has nothing for the layer.
        """
        self._score(queries, scores, weights)

    def _score(
        self, queries: DeviceQueries, scores: torch.Tensor, weights: PoolingWorkspace | None
    ) -> None:
        (key,) = self.paged.indices
        held = queries.cache.indices[key]
        assert isinstance(held, DeviceChannelLabels)
        if held.channels is None:
            raise ValueError(f"the channel file has no layer {queries.cache.layer_index}")
        batch, index = queries.batch, held.index
        labels = self._labels[: len(queries.query)]
        bits = self.config.label_bits
        label_queries(queries.query, held.channels, bits, self.shape.dtype, labels)
        score_labels(
            labels,
            queries.cache.kv_cache,
            held.place,
            index.row_bytes(self.shape),
            bits,
            index.rows_per_head(self.shape),
            batch.block_table,
            batch.rows,
            batch.lengths,
            self.config.group_factor**0.5,
            scores,
            queries.scaling,
            weights,
        )
