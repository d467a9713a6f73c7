"""Random sampling on the device."""

from __future__ import annotations

import torch

from vllm_sparse_plugin.paged.device.maskers.base import DeviceMasker, device_masker_of
from vllm_sparse_plugin.paged.device.queries import DeviceQueries, pooled_units, radix_workspace
from vllm_sparse_plugin.paged.device.space import DeviceSpace
from vllm_sparse_plugin.paged.maskers.base import PagedMasker
from vllm_sparse_plugin.paged.maskers.random_sampling import PagedRandomSamplingMasker
from vllm_sparse_plugin.paged.triton_kernels.sampling import sample_share


@device_masker_of(PagedRandomSamplingMasker)
class DeviceRandomSamplingMasker(DeviceMasker):
    """See `RandomSamplingMasker`."""

    def __init__(self, paged: PagedMasker, space: DeviceSpace) -> None:
        """See `DeviceMasker`."""
        super().__init__(paged, space)
        radix_workspace(space)
        by_group = self.config.head_granularity == "kv_head"
        if by_group:
            pooled_units(space)
        units = self.shape.num_kv_heads if by_group else self.shape.num_heads
        self._order = space.buffer(
            "order", space.max_queries * units, space.capacity, dtype=torch.int32
        )

    def select(self, queries: DeviceQueries, sizes: torch.Tensor) -> None:
        """See `DeviceMasker.select`."""
        with queries.as_units_of(self.config.head_granularity) as units:
            sample_share(
                self.config.sampling_rate,
                self.config.seed,
                queries.cache.layer_index,
                self.shape.num_heads,
                units.batch.lengths,
                units.flags,
                units.probability,
                self._order[: len(units.flags)],
                radix_workspace(queries.space),
            )
