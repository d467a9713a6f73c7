"""Local masker on the device."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch

from vllm_sparse_plugin.paged.device.maskers.base import DeviceMasker, device_masker_of
from vllm_sparse_plugin.paged.device.queries import DeviceQueries
from vllm_sparse_plugin.paged.maskers.local import PagedLocalMasker
from vllm_sparse_plugin.paged.sizes import sizes_of


@device_masker_of(PagedLocalMasker)
class DeviceLocalMasker(DeviceMasker):
    """See `LocalMasker`."""

    is_range: ClassVar[bool] = True

    def sizes(self, lengths: np.ndarray) -> list[np.ndarray]:
        """Where the range begins and ends."""
        return [lengths - sizes_of(lengths, self.config.window_size), lengths]

    def select(self, queries: DeviceQueries, sizes: torch.Tensor) -> None:
        """See `DeviceMasker.select`."""
        queries.add_range(sizes[0], sizes[1])
