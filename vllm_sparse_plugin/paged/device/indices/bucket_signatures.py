"""MagicPIG's signatures of keys on the device."""

from __future__ import annotations

from collections.abc import Callable

import torch

from vllm_sparse_plugin.paged.bucket_signatures import BucketSignatures
from vllm_sparse_plugin.paged.device.indices.base import device_index_of
from vllm_sparse_plugin.paged.device.indices.learned import DeviceLearnedIndex
from vllm_sparse_plugin.paged.device.space import DeviceSpace
from vllm_sparse_plugin.paged.layout import BlockLayout
from vllm_sparse_plugin.paged.triton_kernels.bucket_signatures import sign_keys
from vllm_sparse_plugin.paged.triton_kernels.cache_rows import DeviceBatch

_KEYS_AT_ONCE = 8192
"""Of a mean: it bounds the memory for them."""


@device_index_of(BucketSignatures)
class DeviceBucketSignatures(DeviceLearnedIndex):
    """See `BucketSignatures`.

    Attributes:
        projections: `[num_kv_heads, head_size, L * K]`, float32, of the layer.
    """

    index: BucketSignatures

    def __init__(
        self, index: BucketSignatures, layout: BlockLayout, layer_index: int, space: DeviceSpace
    ) -> None:
        """Brings the layer's projections to the device."""
        super().__init__(index, layout, layer_index, space)
        self.has_states = index.center
        if not index.center:
            # Not 0: that is in headers which nobody has written.
            self.tags.fill_(1)
        projections = torch.from_numpy(index.projections(layer_index, layout.shape))
        self.projections = projections.contiguous().to(space.device)

    def encode(
        self, kv_cache: torch.Tensor, batch: DeviceBatch, num_blocks: int | None = None
    ) -> None:
        """See `DeviceLearnedIndex.encode`."""
        sign_keys(
            kv_cache,
            self.place,
            self.index.codes_at(self.shape),
            self.index.unsigned.itemsize,
            self.index.bits,
            self.projections,
            batch,
            self.tags,
            self.states,
            self.has_states,
            num_blocks,
        )

    def learn(self, read: Callable[[torch.Tensor], torch.Tensor], count: int) -> torch.Tensor:
        """See `DeviceLearnedIndex.learn`: `prefix_mean`, of some keys at a time."""
        size = (self.shape.num_kv_heads, self.shape.head_size)
        total = torch.zeros(size, dtype=torch.float64, device=self.states.device)
        for start in range(0, count, _KEYS_AT_ONCE):
            end = min(count, start + _KEYS_AT_ONCE)
            places = torch.arange(start, end, device=self.states.device)
            # Sums of float64s: rounded to float32, any order of them gives the same mean.
            total += read(places).sum(dim=0, dtype=torch.float64)
        return (total / count).float()
