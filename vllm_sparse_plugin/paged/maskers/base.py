"""The base of paged maskers, and the registry that finds them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, TypeVar

import numpy as np

from sparse_attention_hub.sparse_attention.research_attention.maskers.base import (
    MaskerConfig,
    json_name,
)
from sparse_attention_hub.sparse_attention.research_attention.maskers.sizes import (
    Size,
)
from vllm_sparse_plugin.paged.kernels.group_flags import pool_flags, spread_flags
from vllm_sparse_plugin.paged.kernels.selection import flag_largest, flag_range
from vllm_sparse_plugin.paged.layout import BlockIndex, BlockShape, LayerCache
from vllm_sparse_plugin.paged.scratch import scratch
from vllm_sparse_plugin.paged.sizes import ends_within, sizes_of
from vllm_sparse_plugin.paged.token_lists import NO_KEY_PROBABILITY


@dataclass
class PagedQueries:
    """Queries of one layer and step, each with the keys that it may read.

    Attributes:
        query: `[num_queries, num_heads, head_size]`, float32.
        cache: Of the layer.
        block_table: `[num_rows, max_blocks]`, int32.
        rows: `[num_queries]`, int32: whose blocks a query reads.
        lengths: `[num_queries]`, int32: keys that a query sees; its own is the last.
        scaling: Of the scores.
        flags: `[num_queries * num_units, capacity]`, uint8, what is selected so far; see
            `kernels`. Maskers write it.
        probability: `[num_queries * num_units]`, float32, of sampled keys. Samplers write it.
        scores: `[num_queries, num_heads, capacity]`, float32 scratch.
        keys_scored: `[num_queries]`, int64, rows of keys that were read in order to select, over KV
            heads. Maskers that read some keys add to it; see also `PagedMasker.reads_every_key`.
        key_probability: `[num_queries * num_units, capacity]`, float32, of keys that are sampled
            with a probability of their own; see `PagedMasker.has_key_probabilities`.
    """

    query: np.ndarray
    cache: LayerCache
    block_table: np.ndarray
    rows: np.ndarray
    lengths: np.ndarray
    scaling: float
    flags: np.ndarray
    probability: np.ndarray
    scores: np.ndarray
    keys_scored: np.ndarray
    key_probability: np.ndarray = field(default_factory=lambda: NO_KEY_PROBABILITY)

    def sizes(self, size: Size) -> np.ndarray:
        """See `sizes_of`."""
        return sizes_of(self.lengths, size)

    def add_range(self, begins: np.ndarray, ends: np.ndarray) -> None:
        """Selects keys at positions [begin, end) of each query; both int64 `[num_queries]`."""
        flag_range(self.flags, self.lengths, begins, ends)

    def add_largest(self, page_size: int, head_granularity: str, counts: np.ndarray) -> None:
        """Selects the pages with the highest `scores` that are not all selected.

        Args:
            page_size: Keys of a page.
            head_granularity: Who selects, see `head_groups`.
            counts: `[num_queries]`, pages to select.
        """
        by_group = head_granularity == "kv_head"
        selectors = self.cache.elements.shape[1] if by_group else self.query.shape[1]
        flag_largest(
            self.scores, page_size, selectors, counts, self.scaling, self.lengths, self.flags
        )

    @contextmanager
    def as_units_of(self, head_granularity: str) -> Iterator[PagedQueries]:
        """These queries with the units that a sampler draws for; what it selects is taken over.

        Args:
            head_granularity: Who draws, see `head_groups`. "kv_head" where other maskers select per
                query head: the units are KV heads, which begin with what any query head of their
                group has selected, and in the end all of these have the same.
        """
        num_queries, num_kv_heads = len(self.lengths), self.cache.elements.shape[1]
        num_pooled, capacity = num_queries * num_kv_heads, self.flags.shape[1]
        if head_granularity == "query_head" or len(self.flags) == num_pooled:
            yield self
            return
        units = replace(
            self,
            flags=scratch("pooled_flags", (num_pooled, capacity), np.uint8),
            probability=np.zeros(num_pooled, np.float32),
        )
        pool_flags(self.flags, self.lengths, units.flags)
        yield units
        spread_flags(units.flags, self.lengths, self.flags)
        self.probability[:] = np.repeat(units.probability, len(self.flags) // num_pooled)

    def select_all_within(self, size: Size) -> None:
        """Selects every key of the queries that see no more than a size given in keys."""
        if isinstance(size, int):
            ends = ends_within(self.lengths, size)
            self.add_range(np.zeros_like(ends), ends)


class PagedMasker(ABC):
    """Selects keys as its masker of the hub does, from what blocks hold.

    Attributes:
        reads_every_key: Whether it looks at all keys in order to select.
        samples: Whether it selects keys with a probability.
        has_key_probabilities: Whether these are the keys' own (flag 3), not the unit's.
    """

    reads_every_key: ClassVar[bool] = False
    samples: ClassVar[bool] = False
    has_key_probabilities: ClassVar[bool] = False

    def __init__(self, config: Any, shape: BlockShape) -> None:
        """Keeps the configuration.

        Args:
            config: Of the masker.
            shape: Of the cache.

        Raises:
            Unsupported: This configuration has no counterpart on such a cache.
        """
        self.config = config
        self.shape = shape

    @property
    def indices(self) -> tuple[BlockIndex, ...]:
        """What blocks must hold for it besides keys and values."""
        return ()

    @property
    def needs_query_heads(self) -> bool:
        """Whether query heads of one KV head may select different keys."""
        return getattr(self.config, "head_granularity", "kv_head") == "query_head"

    @abstractmethod
    def select(self, queries: PagedQueries) -> None:
        """Adds to `queries.flags` what the masker selects beyond what is selected already."""


class Unsupported(Exception):
    """Why the fast path cannot serve a masker: no error, the general path does."""


_COUNTERPARTS: dict[type[MaskerConfig], type[PagedMasker]] = {}
Masker = TypeVar("Masker", bound="type[PagedMasker]")


def counterpart_of(config_type: type[MaskerConfig]) -> Callable[[Masker], Masker]:
    """Class decorator: the paged masker of a configuration class."""

    def decorate(masker: Masker) -> Masker:
        _COUNTERPARTS[config_type] = masker
        return masker

    return decorate


def has_counterpart(config_type: type[MaskerConfig]) -> bool:
    """Whether maskers of this configuration class have one."""
    return config_type in _COUNTERPARTS


def paged_masker(config: MaskerConfig, shape: BlockShape) -> PagedMasker:
    """The counterpart of a masker.

    Raises:
        Unsupported: There is none, or not for this configuration.
    """
    masker = _COUNTERPARTS.get(type(config))
    if masker is None:
        raise Unsupported(f"{json_name(type(config))} has no paged counterpart")
    return masker(config, shape)
