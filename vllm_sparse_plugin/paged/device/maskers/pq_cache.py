"""PQCache on the device."""

from __future__ import annotations

import torch

from vllm_sparse_plugin.paged.centroid_codes import CentroidCodes
from vllm_sparse_plugin.paged.device.indices.centroid_codes import DeviceCentroidCodes
from vllm_sparse_plugin.paged.device.maskers.base import device_masker_of
from vllm_sparse_plugin.paged.device.maskers.top_k import DeviceTopKMasker
from vllm_sparse_plugin.paged.device.queries import DeviceQueries
from vllm_sparse_plugin.paged.device.space import DeviceSpace
from vllm_sparse_plugin.paged.maskers.base import PagedMasker
from vllm_sparse_plugin.paged.maskers.pq_cache import PagedPQCache
from vllm_sparse_plugin.paged.triton_kernels.centroid_codes import fill_tables
from vllm_sparse_plugin.paged.triton_kernels.code_scores import score_codes, score_uncoded


@device_masker_of(PagedPQCache)
class DevicePQCache(DeviceTopKMasker):
    """See `PQCache`."""

    def __init__(self, paged: PagedMasker, space: DeviceSpace) -> None:
        """See `DeviceMasker`."""
        super().__init__(paged, space)
        (index,) = paged.indices
        assert isinstance(index, CentroidCodes)
        self._tables = space.buffer(
            "query tables",
            space.max_queries,
            self.shape.num_kv_heads,
            index.num_parts(self.shape),
            index.num_centroids,
            self.shape.num_heads // self.shape.num_kv_heads,
            dtype=torch.float32,
        )

    def score(self, queries: DeviceQueries, scores: torch.Tensor) -> None:
        """See `DeviceTopKMasker.score`."""
        (key,) = self.paged.indices
        held, batch, cache = queries.cache.indices[key], queries.batch, queries.cache
        assert isinstance(held, DeviceCentroidCodes)
        assert batch.places is not None
        index, (offset, stride) = held.index, held.place
        tables = self._tables[: len(queries.query)]
        fill_tables(queries.query, batch.places, held.states, index.sub_dim, tables)
        score_codes(
            tables,
            cache.kv_cache,
            (offset + index.codes_at(self.shape), stride),
            index.stored_bits,
            batch.block_table,
            batch.rows,
            batch.lengths,
            scores,
        )
        score_uncoded(
            tables,
            cache.kv_cache,
            held.place,
            self.shape.head_size,
            batch,
            held.tags,
            held.states,
            scores,
        )
