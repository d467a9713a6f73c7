"""PQCache's codes of keys on the device."""

from __future__ import annotations

from collections.abc import Callable

import torch

from sparse_attention_hub.sparse_attention.research_attention.maskers.fixed.implementations.pq_top_k import (  # noqa: E501
    training_keys,
)
from vllm_sparse_plugin.paged.centroid_codes import CentroidCodes
from vllm_sparse_plugin.paged.device.indices.base import device_index_of
from vllm_sparse_plugin.paged.device.indices.learned import DeviceLearnedIndex
from vllm_sparse_plugin.paged.triton_kernels.cache_rows import DeviceBatch
from vllm_sparse_plugin.paged.triton_kernels.centroid_codes import encode_keys


@device_index_of(CentroidCodes)
class DeviceCentroidCodes(DeviceLearnedIndex):
    """See `CentroidCodes`."""

    index: CentroidCodes

    def encode(
        self, kv_cache: torch.Tensor, batch: DeviceBatch, num_blocks: int | None = None
    ) -> None:
        """See `DeviceLearnedIndex.encode`."""
        encode_keys(
            kv_cache,
            self.place,
            self.index.codes_at(self.shape),
            self.index.stored_bits,
            self.shape.head_size,
            self.index.sub_dim,
            self.index.num_centroids,
            batch,
            self.tags,
            self.states,
            num_blocks,
        )

    def learn(self, read: Callable[[torch.Tensor], torch.Tensor], count: int) -> torch.Tensor:
        """See `DeviceLearnedIndex.learn`."""
        keys = read(training_keys(count, self.states.device))
        return self.index.state_of(keys.transpose(0, 1)[None].float())
