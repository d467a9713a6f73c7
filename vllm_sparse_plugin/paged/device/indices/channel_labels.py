"""Double Sparsity's labels of keys on the device."""

from __future__ import annotations

import torch

from vllm_sparse_plugin.paged.cache_scales import UNSCALED, CacheScales
from vllm_sparse_plugin.paged.channel_labels import ChannelLabels
from vllm_sparse_plugin.paged.device.indices.base import DeviceIndex, device_index_of
from vllm_sparse_plugin.paged.device.space import DeviceSpace
from vllm_sparse_plugin.paged.layout import BlockLayout
from vllm_sparse_plugin.paged.triton_kernels.channel_labels import write_labels


@device_index_of(ChannelLabels)
class DeviceChannelLabels(DeviceIndex):
    """See `ChannelLabels`.

    Attributes:
        channels: `[rows, C]`, int32, of the layer; None: the file has nothing for it, and no masker
            can ask for its labels.
    """

    def __init__(
        self, index: ChannelLabels, layout: BlockLayout, layer_index: int, space: DeviceSpace
    ) -> None:
        """Brings the layer's channels to the device."""
        super().__init__(index, layout, layer_index, space)
        self.channels: torch.Tensor | None = None
        try:
            channels = index.channels(layer_index, layout.shape)
        except ValueError:
            return
        self.channels = torch.from_numpy(channels).to(space.device)

    def update(
        self,
        kv_cache: torch.Tensor,
        slots: torch.Tensor,
        key: torch.Tensor | None = None,
        value: torch.Tensor | None = None,
        scales: CacheScales = UNSCALED,
    ) -> None:
        """See `DeviceIndex.update`."""
        if self.channels is None:
            return
        write_labels(
            kv_cache,
            self.place,
            self.index.row_bytes(self.shape),
            self.index.label_bits,
            self.channels,
            self.shape.head_size,
            slots,
        )
