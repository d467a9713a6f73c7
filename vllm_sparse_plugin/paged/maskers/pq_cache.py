"""PQCache on pages: it reads a code of every key's sub-vectors, and the best keys themselves."""

from __future__ import annotations

from typing import Any

import numpy as np

from sparse_attention_hub.sparse_attention.research_attention.maskers.fixed import PQCacheConfig
from vllm_sparse_plugin.paged.centroid_codes import CentroidCodes
from vllm_sparse_plugin.paged.kernels.centroid_codes import fill_tables, score_codes
from vllm_sparse_plugin.paged.layout import BlockIndex, BlockShape
from vllm_sparse_plugin.paged.learned_index import Turn
from vllm_sparse_plugin.paged.maskers.base import (
    PagedMasker,
    PagedQueries,
    Unsupported,
    counterpart_of,
)
from vllm_sparse_plugin.paged.scratch import scratch

_ENTRIES_AT_ONCE = 1 << 23
"""Of the queries' tables (32 MiB): of a prompt's queries, some at a time."""


@counterpart_of(PQCacheConfig)
class PagedPQCache(PagedMasker):
    """See `PQCache`; a key that is as near to two centroids as float noise may get another code."""

    def __init__(self, config: Any, shape: BlockShape) -> None:
        """Looks whether blocks can hold the codes."""
        super().__init__(config, shape)
        self._codes = CentroidCodes(config.pq_sub_dim, config.pq_bits, config.kmeans_iterations)
        reason = self._codes.reason_against(shape)
        if reason is not None:
            raise Unsupported(f"pq_cache: {reason}")

    @property
    def indices(self) -> tuple[BlockIndex, ...]:
        """See `PagedMasker.indices`."""
        return (self._codes,)

    def select(self, queries: PagedQueries) -> None:
        """See `PagedMasker.select`."""
        turns = self._codes.turns(queries.cache, queries.block_table, queries.rows, queries.lengths)
        for turn in turns:
            self._score(queries, turn)
        queries.select_all_within(self.config.heavy_size)
        queries.add_largest(1, self.config.head_granularity, queries.sizes(self.config.heavy_size))

    def _score(self, queries: PagedQueries, turn: Turn) -> None:
        """Writes the scores of a turn's queries."""
        shape, codes = self.shape, self._codes
        layout = queries.cache.layout
        group = shape.num_heads // shape.num_kv_heads
        size = (shape.num_kv_heads, codes.num_parts(shape), codes.num_centroids, group)
        at_once = max(1, _ENTRIES_AT_ONCE // int(np.prod(size)))
        for start in range(0, len(turn.queries), at_once):
            some = turn.queries[start : start + at_once]
            tables = scratch("tables", (len(some), *size), np.float32)
            fill_tables(
                queries.query,
                some,
                turn.places,
                turn.states,
                shape.num_kv_heads,
                codes.sub_dim,
                tables,
            )
            score_codes(
                tables,
                some,
                queries.cache.records,
                layout.place_of(codes, codes.codes_at(shape)),
                codes.stored_bits,
                shape.block_size,
                queries.block_table,
                queries.rows,
                queries.lengths,
                queries.scores,
            )
