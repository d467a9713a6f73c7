"""Sparse and dense attention of a step's queries on pages: plan, then read what is selected."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sparse_attention_hub.sparse_attention.research_attention.maskers.base import MaskerConfig
from vllm_sparse_plugin.paged import maskers as _registers_counterparts  # noqa: F401
from vllm_sparse_plugin.paged.kernels.attention import attend_lists
from vllm_sparse_plugin.paged.kernels.lists import clear_flags
from vllm_sparse_plugin.paged.layout import BlockShape, LayerCache
from vllm_sparse_plugin.paged.maskers.base import (
    PagedMasker,
    PagedQueries,
    Unsupported,
    paged_masker,
)
from vllm_sparse_plugin.paged.scratch import scratch
from vllm_sparse_plugin.paged.token_lists import (
    EVERY_KEY,
    NO_KEY_PROBABILITY,
    NO_WEIGHTS,
    TokenLists,
)

MAX_ENTRIES = 1 << 24
"""Scores that are held at once (64 MiB, and flags and lists beside them); more queries go in
slices."""


NO_SINKS = np.zeros(0, np.float32)
"""The logits of learned attention sinks in a layer that has none."""


@dataclass(frozen=True)
class QueryBatch:
    """Which queries of a step attend, and what they see.

    Attributes:
        block_table: `[num_rows, max_blocks]`, int32.
        rows: `[num_queries]`, int32, of the block table.
        lengths: `[num_queries]`, int32: keys that each sees.
    """

    block_table: np.ndarray
    rows: np.ndarray
    lengths: np.ndarray


@dataclass(frozen=True)
class ReadCounts:
    """What each query read in one layer.

    Attributes:
        keys: `[num_queries]`, int64: keys read, summed over query heads.
        loaded_bytes: `[num_queries]`, int64: bytes of keys, values and index that were loaded.
    """

    keys: np.ndarray
    loaded_bytes: np.ndarray


class PagedAttention:
    """A list of paged maskers, applied to queries of one layer.

    Attributes:
        maskers: In the order they are applied.
        shape: Of the cache.
    """

    def __init__(self, configs: Sequence[MaskerConfig], shape: BlockShape) -> None:
        """Builds the counterparts.

        Args:
            configs: At least one masker.
            shape: Of the cache.

        Raises:
            Unsupported: One of them has no counterpart; says which.
        """
        self.shape = shape
        self.maskers = paged_maskers(configs, shape)
        by_head = any(masker.needs_query_heads for masker in self.maskers)
        self._num_units = shape.num_heads if by_head else shape.num_kv_heads
        self._scanned_bytes_per_block = scanned_bytes_per_block(self.maskers, shape)

    def attend(
        self,
        query: np.ndarray,
        cache: LayerCache,
        batch: QueryBatch,
        scaling: float,
        output: np.ndarray | None = None,
        sink_logits: np.ndarray = NO_SINKS,
    ) -> tuple[np.ndarray, ReadCounts]:
        """Attention of each query over what the maskers select for it.

        Args:
            query: `[num_queries, num_heads, head_size]`, float32.
            cache: Of the layer, with the index that the maskers need.
            batch: Of the queries.
            scaling: Of the scores.
            output: As `query`; written. None = a new one.
            sink_logits: `[num_heads]`, float32, of learned attention sinks, if the layer has some.

        Returns:
            The output, and what was read.
        """
        output = np.empty_like(query) if output is None else output
        scaling *= cache.scales.key
        num_queries = len(batch.lengths)
        keys, loaded = np.empty(num_queries, np.int64), np.empty(num_queries, np.int64)
        capacity = -(-int(batch.lengths.max()) // 8) * 8
        size = max(1, MAX_ENTRIES // (capacity * self.shape.num_heads))
        for start in range(0, num_queries, size):
            part = slice(start, start + size)
            self._attend_slice(
                query[part],
                cache,
                QueryBatch(batch.block_table, batch.rows[part], batch.lengths[part]),
                scaling,
                output[part],
                ReadCounts(keys[part], loaded[part]),
                sink_logits,
            )
        return output, ReadCounts(keys, loaded)

    def _attend_slice(
        self,
        query: np.ndarray,
        cache: LayerCache,
        batch: QueryBatch,
        scaling: float,
        output: np.ndarray,
        read: ReadCounts,
        sink_logits: np.ndarray,
    ) -> None:
        queries = self._select(query, cache, batch, scaling)
        lists = TokenLists.of(
            queries.flags,
            queries.probability,
            batch.lengths,
            self.shape.num_heads,
            self.shape.num_kv_heads,
            is_sampled=any(masker.samples for masker in self.maskers),
            key_probability=queries.key_probability,
        )
        selected = (lists.tokens, lists.log_weights, lists.counts)
        _attend_lists(query, cache, batch, scaling, *selected, output, sink_logits)
        read.keys[:] = lists.keys_read
        loaded = lists.counts.reshape(len(query), -1).sum(axis=1, dtype=np.int64)
        scanned = batch.lengths.astype(np.int64) * self._scanned_bytes_per_block
        read.loaded_bytes[:] = (
            loaded * self.shape.key_value_bytes
            + scanned // self.shape.block_size
            + queries.keys_scored * (self.shape.key_value_bytes // 2)
        )

    def _select(
        self, query: np.ndarray, cache: LayerCache, batch: QueryBatch, scaling: float
    ) -> PagedQueries:
        """The queries with what the maskers select."""
        num_queries, num_heads, _ = query.shape
        capacity = -(-int(batch.lengths.max()) // 8) * 8
        units = num_queries * self._num_units
        key_probability = NO_KEY_PROBABILITY
        if any(masker.has_key_probabilities for masker in self.maskers):
            key_probability = scratch("key_probability", (units, capacity), np.float32)
        queries = PagedQueries(
            query=query,
            cache=cache,
            block_table=batch.block_table,
            rows=batch.rows,
            lengths=batch.lengths,
            scaling=scaling,
            flags=scratch("flags", (units, capacity), np.uint8),
            probability=np.zeros(units, np.float32),
            scores=scratch("scores", (num_queries, num_heads, capacity), np.float32),
            keys_scored=np.zeros(num_queries, np.int64),
            key_probability=key_probability,
        )
        clear_flags(queries.flags, batch.lengths)
        for masker in self.maskers:
            masker.select(queries)
        return queries


def paged_maskers(configs: Sequence[MaskerConfig], shape: BlockShape) -> list[PagedMasker]:
    """The counterparts of a list of maskers.

    Raises:
        Unsupported: One has none, or there are no maskers; says which.
    """
    if not configs:
        raise Unsupported("no maskers")
    return [paged_masker(config, shape) for config in configs]


def scanned_bytes_per_block(maskers: Sequence[PagedMasker], shape: BlockShape) -> int:
    """Bytes that maskers read of every block to select: indices, or keys."""
    indices = {index for masker in maskers for index in masker.indices}
    per_block = sum(index.bytes_per_block(shape) for index in indices)
    if any(masker.reads_every_key for masker in maskers):
        per_block += shape.block_size * shape.key_value_bytes // 2
    return per_block * shape.num_kv_heads


def attend_dense(
    query: np.ndarray,
    cache: LayerCache,
    batch: QueryBatch,
    scaling: float,
    output: np.ndarray | None = None,
    sink_logits: np.ndarray = NO_SINKS,
) -> np.ndarray:
    """Attention of each query over every key that it sees; see `PagedAttention.attend`."""
    output = np.empty_like(query) if output is None else output
    scaling *= cache.scales.key
    counts = np.repeat(batch.lengths, cache.layout.shape.num_kv_heads)
    lists = (EVERY_KEY, NO_WEIGHTS, counts)
    _attend_lists(query, cache, batch, scaling, *lists, output, sink_logits)
    return output


def _attend_lists(
    query: np.ndarray,
    cache: LayerCache,
    batch: QueryBatch,
    scaling: float,
    tokens: np.ndarray,
    log_weights: np.ndarray,
    counts: np.ndarray,
    output: np.ndarray,
    sink_logits: np.ndarray,
) -> None:
    shape = cache.layout.shape
    attend_lists(
        query,
        cache.elements,
        shape.kind,
        shape.block_size,
        batch.block_table,
        batch.rows,
        tokens,
        log_weights,
        counts,
        scaling,
        output,
        sink_logits,
    )
    if cache.scales.value != 1:
        output *= np.float32(cache.scales.value)
