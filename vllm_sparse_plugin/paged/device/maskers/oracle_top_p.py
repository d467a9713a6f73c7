"""Oracle top-p on the device: it reads every key, to be the measure of the others."""

from __future__ import annotations

import torch

from vllm_sparse_plugin.paged.device.maskers.base import DeviceMasker, device_masker_of
from vllm_sparse_plugin.paged.device.queries import DeviceQueries, scores_buffer
from vllm_sparse_plugin.paged.device.space import DeviceSpace
from vllm_sparse_plugin.paged.maskers.base import PagedMasker
from vllm_sparse_plugin.paged.maskers.oracle_top_p import PagedOracleTopPMasker
from vllm_sparse_plugin.paged.triton_kernels.key_scores import score_keys
from vllm_sparse_plugin.paged.triton_kernels.mass_selection import MassWorkspace, flag_mass


@device_masker_of(PagedOracleTopPMasker)
class DeviceOracleTopPMasker(DeviceMasker):
    """See `OracleTopPMasker`."""

    def __init__(self, paged: PagedMasker, space: DeviceSpace) -> None:
        """See `DeviceMasker`."""
        super().__init__(paged, space)
        scores_buffer(space, 1)
        self._workspace = space.scratch(
            MassWorkspace.of, space.max_queries, self.shape.num_heads, space.capacity
        )

    def select(self, queries: DeviceQueries, sizes: torch.Tensor) -> None:
        """See `DeviceMasker.select`."""
        batch, scores = queries.batch, queries.scores()
        score_keys(
            queries.query,
            queries.cache.kv_cache,
            batch.block_table,
            batch.rows,
            batch.lengths,
            scores,
        )
        flag_mass(
            scores,
            self.config.top_p,
            queries.scaling,
            batch.lengths,
            queries.flags,
            self._workspace,
        )
