"""HashAttention on the device."""

from __future__ import annotations

import torch

from vllm_sparse_plugin.paged.device.indices.hash_signatures import (
    DeviceHashSignatures,
    scratch_of,
)
from vllm_sparse_plugin.paged.device.maskers.base import device_masker_of
from vllm_sparse_plugin.paged.device.maskers.top_k import DeviceTopKMasker
from vllm_sparse_plugin.paged.device.queries import DeviceQueries
from vllm_sparse_plugin.paged.device.space import DeviceSpace
from vllm_sparse_plugin.paged.hash_signatures import HashSignatures
from vllm_sparse_plugin.paged.maskers.base import PagedMasker
from vllm_sparse_plugin.paged.maskers.hash_attention_top_k import PagedHashAttentionTopKMasker
from vllm_sparse_plugin.paged.triton_kernels.signature_networks import sign_queries
from vllm_sparse_plugin.paged.triton_kernels.signature_scores import score_signatures


@device_masker_of(PagedHashAttentionTopKMasker)
class DeviceHashAttentionTopKMasker(DeviceTopKMasker):
    """See `HashAttentionTopKMasker`."""

    def __init__(self, paged: PagedMasker, space: DeviceSpace) -> None:
        """See `DeviceMasker`."""
        super().__init__(paged, space)
        (index,) = paged.indices
        assert isinstance(index, HashSignatures)
        queries, heads = space.max_queries, self.shape.num_heads
        self._own = space.buffer("query signatures", queries, heads, index.words, dtype=torch.int32)
        sizes = index.hidden_sizes("query")
        self._hidden = scratch_of(sizes, "hidden queries", heads, queries, space)

    def score(self, queries: DeviceQueries, scores: torch.Tensor) -> None:
        """See `DeviceTopKMasker.score`.

        Raises:
            ValueError: The weights have nothing for the layer.
        """
        (key,) = self.paged.indices
        held = queries.cache.indices[key]
        assert isinstance(held, DeviceHashSignatures)
        networks = held.query_networks
        if networks is None:
            raise ValueError(f"the weights have no layer {queries.cache.layer_index}")
        own, batch = self._own[: len(queries.query)], queries.batch
        sign_queries(
            queries.query,
            networks.matrices,
            networks.biases,
            self.config.hat_mlp_activation,
            networks.hidden(self._hidden),
            own,
        )
        score_signatures(
            own,
            self.config.hat_bits,
            queries.cache.kv_cache,
            held.place,
            held.index.rows_per_head(self.shape),
            batch.block_table,
            batch.rows,
            batch.lengths,
            scores,
        )
