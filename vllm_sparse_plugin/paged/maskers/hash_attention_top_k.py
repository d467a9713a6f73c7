"""HashAttention on pages: it reads a signature of every key, and the best keys themselves."""

from __future__ import annotations

from typing import Any

import numpy as np

from sparse_attention_hub.sparse_attention.research_attention.maskers.fixed import (
    HashAttentionTopKMaskerConfig,
)
from vllm_sparse_plugin.paged.hash_signatures import HashSignatures
from vllm_sparse_plugin.paged.kernels.hash_signatures import score_signatures
from vllm_sparse_plugin.paged.layout import BlockIndex, BlockShape
from vllm_sparse_plugin.paged.maskers.base import (
    PagedMasker,
    PagedQueries,
    Unsupported,
    counterpart_of,
)


@counterpart_of(HashAttentionTopKMaskerConfig)
class PagedHashAttentionTopKMasker(PagedMasker):
    """See `HashAttentionTopKMasker`; an output of exactly 0 is a set bit here too."""

    def __init__(self, config: Any, shape: BlockShape) -> None:
        """Looks whether blocks can hold the signatures."""
        super().__init__(config, shape)
        if config.hat_weight_file is None:
            raise Unsupported("hash_attention_top_k: only weights in a file have an index")
        self._signatures = HashSignatures(
            config.hat_weight_file, config.hat_bits, config.hat_mlp_activation
        )
        reason = self._signatures.reason_against(shape)
        if reason is not None:
            raise Unsupported(f"hash_attention_top_k: {reason}")

    @property
    def indices(self) -> tuple[BlockIndex, ...]:
        """See `PagedMasker.indices`."""
        return (self._signatures,)

    def select(self, queries: PagedQueries) -> None:
        """See `PagedMasker.select`.

        Raises:
            ValueError: The weights have nothing for the layer.
        """
        cache = queries.cache
        own = self._signatures.signatures(
            np.ascontiguousarray(queries.query.transpose(1, 0, 2)),
            cache.layer_index,
            "query",
            self.shape.num_heads,
        )
        score_signatures(
            np.ascontiguousarray(own.transpose(1, 0, 2)),
            self.config.hat_bits,
            cache.records,
            cache.layout.place_of(self._signatures),
            self._signatures.rows_per_head(self.shape),
            self.shape.block_size,
            queries.block_table,
            queries.rows,
            queries.lengths,
            queries.scores,
        )
        queries.select_all_within(self.config.heavy_size)
        queries.add_largest(1, self.config.head_granularity, queries.sizes(self.config.heavy_size))
