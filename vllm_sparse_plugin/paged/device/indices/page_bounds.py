"""Quest's bounds of pages on the device."""

from __future__ import annotations

from typing import ClassVar

import torch

from vllm_sparse_plugin.paged.cache_scales import UNSCALED, CacheScales
from vllm_sparse_plugin.paged.device.indices.base import DeviceIndex, device_index_of
from vllm_sparse_plugin.paged.page_bounds import PageBounds
from vllm_sparse_plugin.paged.triton_kernels.page_bounds import update_pages


@device_index_of(PageBounds)
class DevicePageBounds(DeviceIndex):
    """See `PageBounds`."""

    writes_rows: ClassVar[bool] = True

    def update(
        self,
        kv_cache: torch.Tensor,
        slots: torch.Tensor,
        key: torch.Tensor | None = None,
        value: torch.Tensor | None = None,
        scales: CacheScales = UNSCALED,
    ) -> None:
        """See `DeviceIndex.update`."""
        update_pages(
            kv_cache,
            self.place,
            self.index.record_bytes(self.shape),
            self.shape.head_size,
            self.index.page_size,
            self.index.label_bits,
            slots,
            key,
            value,
            scales,
        )
