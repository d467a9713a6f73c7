"""Adaptive sampling (vAttention) on the device."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
import torch

from vllm_sparse_plugin.paged.device.maskers.base import DeviceMasker, device_masker_of
from vllm_sparse_plugin.paged.device.queries import DeviceQueries, pooled_units, radix_workspace
from vllm_sparse_plugin.paged.device.space import DeviceSpace
from vllm_sparse_plugin.paged.maskers.adaptive_sampling import (
    PagedAdaptiveSamplingMasker,
    base_sample,
)
from vllm_sparse_plugin.paged.maskers.base import PagedMasker
from vllm_sparse_plugin.paged.sizes import sizes_of
from vllm_sparse_plugin.paged.triton_kernels.adaptive_sampling import (
    AdaptiveWorkspace,
    sample_adaptively,
)
from vllm_sparse_plugin.paged.triton_kernels.cache_rows import parts_for
from vllm_sparse_plugin.paged.triton_kernels.read_counts import add_scored


@device_masker_of(PagedAdaptiveSamplingMasker)
class DeviceAdaptiveSamplingMasker(DeviceMasker):
    """See `AdaptiveSamplingMasker`."""

    def __init__(self, paged: PagedMasker, space: DeviceSpace) -> None:
        """See `DeviceMasker`."""
        super().__init__(paged, space)
        radix_workspace(space)
        by_group = self.config.head_granularity == "kv_head"
        if by_group:
            pooled_units(space)
        shape = self.shape
        self._workspace = space.scratch(
            AdaptiveWorkspace.of,
            space.max_queries,
            shape.num_heads,
            shape.num_kv_heads,
            shape.num_kv_heads if by_group else shape.num_heads,
            space.capacity,
            parts=parts_for(space.capacity),
        )
        self._quantile = NormalDist().inv_cdf(1 - self.config.delta / 2)

    def sizes(self, lengths: np.ndarray) -> list[np.ndarray]:
        """Where two ranges begin and end: the first keys and the last."""
        first = sizes_of(lengths, self.config.init_offset)
        last = lengths - sizes_of(lengths, self.config.local_offset)
        return [np.zeros_like(lengths), first, np.maximum(first, last), lengths]

    def select(self, queries: DeviceQueries, sizes: torch.Tensor) -> None:
        """See `DeviceMasker.select`."""
        queries.add_range(sizes[0], sizes[1])
        queries.add_range(sizes[2], sizes[3])
        config, space, batch = self.config, self._workspace, queries.batch
        with queries.as_units_of(config.head_granularity) as units:
            sample_adaptively(
                units.query,
                units.cache.kv_cache,
                batch,
                units.scaling,
                *base_sample(config),
                config.epsilon,
                self._quantile,
                config.seed,
                units.cache.layer_index,
                units.flags,
                units.probability,
                space,
                radix_workspace(queries.space),
            )
            add_scored(
                space.selected.counts,
                space.base.counts,
                self.shape.num_kv_heads,
                batch.lengths,
                queries.reads,
            )
