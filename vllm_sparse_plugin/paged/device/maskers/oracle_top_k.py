"""Oracle top-k on the device: it reads every key, to be the measure of the others."""

from __future__ import annotations

import torch

from vllm_sparse_plugin.paged.device.maskers.base import device_masker_of
from vllm_sparse_plugin.paged.device.maskers.top_k import DeviceTopKMasker
from vllm_sparse_plugin.paged.device.queries import DeviceQueries
from vllm_sparse_plugin.paged.maskers.oracle_top_k import PagedOracleTopKMasker
from vllm_sparse_plugin.paged.triton_kernels.key_scores import score_keys


@device_masker_of(PagedOracleTopKMasker)
class DeviceOracleTopKMasker(DeviceTopKMasker):
    """See `OracleTopKMasker`."""

    def score(self, queries: DeviceQueries, scores: torch.Tensor) -> None:
        """See `DeviceTopKMasker.score`."""
        batch = queries.batch
        score_keys(
            queries.query,
            queries.cache.kv_cache,
            batch.block_table,
            batch.rows,
            batch.lengths,
            scores,
        )
