"""MagicPIG on pages: it reads a signature of every key, and the keys that it samples."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from sparse_attention_hub.sparse_attention.research_attention.maskers.sampling import MagicPigConfig
from vllm_sparse_plugin.paged.bucket_signatures import BucketSignatures
from vllm_sparse_plugin.paged.kernels.bucket_signatures import (
    flag_collisions,
    sign_queries,
    weigh_collisions,
)
from vllm_sparse_plugin.paged.layout import BlockIndex, BlockShape
from vllm_sparse_plugin.paged.maskers.base import PagedMasker, PagedQueries, counterpart_of


@counterpart_of(MagicPigConfig)
class PagedMagicPig(PagedMasker):
    """See `MagicPig`; a projection within float noise of 0 may fall on the other side here."""

    samples: ClassVar[bool] = True
    has_key_probabilities: ClassVar[bool] = True

    def __init__(self, config: Any, shape: BlockShape) -> None:
        """Keeps what blocks hold."""
        super().__init__(config, shape)
        self._signatures = BucketSignatures(config.lsh_l, config.lsh_k, config.center, config.seed)

    @property
    def indices(self) -> tuple[BlockIndex, ...]:
        """See `PagedMasker.indices`."""
        return (self._signatures,)

    @property
    def needs_query_heads(self) -> bool:
        """See `PagedMasker`: every query head has its own sample."""
        return True

    def select(self, queries: PagedQueries) -> None:
        """See `PagedMasker.select`."""
        shape, index, cache = self.shape, self._signatures, queries.cache
        own = np.empty((*queries.query.shape[:2], index.tables), index.unsigned)
        projections = index.projections(cache.layer_index, shape)
        sign_queries(queries.query, projections, index.bits, own)
        blocks = -(-int(queries.lengths.max()) // shape.block_size)
        turns = index.turns(cache, queries.block_table, queries.rows, queries.lengths)
        for turn in turns:
            flag_collisions(
                own,
                cache.records,
                cache.layout.place_of(index, index.codes_at(shape)),
                shape.block_size,
                queries.block_table,
                queries.rows,
                queries.lengths,
                turn.queries,
                queries.flags,
            )
            scored = np.zeros((len(turn.queries), shape.num_kv_heads, blocks), np.int32)
            weigh_collisions(
                queries.query,
                cache.elements,
                shape.kind,
                shape.block_size,
                queries.block_table,
                queries.rows,
                queries.lengths,
                turn.queries,
                index.tables,
                index.bits,
                turn.places,
                turn.states,
                queries.flags,
                queries.key_probability,
                scored,
            )
            queries.keys_scored[turn.queries] += scored.sum(axis=(1, 2), dtype=np.int64)
