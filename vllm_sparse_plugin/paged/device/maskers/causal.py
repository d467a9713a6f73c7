"""Causal masker on the device: it selects nothing."""

from __future__ import annotations

import torch

from vllm_sparse_plugin.paged.device.maskers.base import DeviceMasker, device_masker_of
from vllm_sparse_plugin.paged.device.queries import DeviceQueries
from vllm_sparse_plugin.paged.maskers.causal import PagedCausalMasker


@device_masker_of(PagedCausalMasker)
class DeviceCausalMasker(DeviceMasker):
    """See `CausalMasker`."""

    def select(self, queries: DeviceQueries, sizes: torch.Tensor) -> None:
        """See `DeviceMasker.select`."""
