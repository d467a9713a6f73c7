"""MagicPIG on the device."""

from __future__ import annotations

import torch

from vllm_sparse_plugin.paged.bucket_signatures import BucketSignatures
from vllm_sparse_plugin.paged.device.indices.bucket_signatures import DeviceBucketSignatures
from vllm_sparse_plugin.paged.device.maskers.base import DeviceMasker, device_masker_of
from vllm_sparse_plugin.paged.device.queries import DeviceQueries
from vllm_sparse_plugin.paged.device.space import DeviceSpace
from vllm_sparse_plugin.paged.maskers.base import PagedMasker
from vllm_sparse_plugin.paged.maskers.magic_pig import PagedMagicPig
from vllm_sparse_plugin.paged.triton_kernels.bucket_collisions import flag_collisions
from vllm_sparse_plugin.paged.triton_kernels.bucket_signatures import sign_queries
from vllm_sparse_plugin.paged.triton_kernels.bucket_weights import weigh_collisions


@device_masker_of(PagedMagicPig)
class DeviceMagicPig(DeviceMasker):
    """See `MagicPig`."""

    def __init__(self, paged: PagedMasker, space: DeviceSpace) -> None:
        """See `DeviceMasker`."""
        super().__init__(paged, space)
        (index,) = paged.indices
        assert isinstance(index, BucketSignatures)
        self._own = space.buffer(
            "query buckets",
            space.max_queries,
            self.shape.num_heads,
            index.tables,
            dtype=torch.int64,
        )

    def select(self, queries: DeviceQueries, sizes: torch.Tensor) -> None:
        """See `DeviceMasker.select`."""
        (key,) = self.paged.indices
        held, batch, kv_cache = queries.cache.indices[key], queries.batch, queries.cache.kv_cache
        assert isinstance(held, DeviceBucketSignatures)
        assert queries.key_probability is not None
        index, own = held.index, self._own[: len(queries.query)]
        sign_queries(queries.query, held.projections, index.bits, own)
        flag_collisions(
            own,
            kv_cache,
            held.place,
            index.codes_at(self.shape),
            index.unsigned.itemsize,
            index.bits,
            held.projections,
            batch,
            held.tags,
            held.states,
            held.has_states,
            queries.flags,
        )
        weigh_collisions(
            queries.query,
            kv_cache,
            batch,
            index.tables,
            index.bits,
            held.states,
            queries.flags,
            queries.key_probability,
            queries.reads,
        )
