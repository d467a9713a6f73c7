"""Sparse attention of a layer's queries on the device: select, then read what is selected."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from sparse_attention_hub.sparse_attention.research_attention.maskers.base import MaskerConfig
from vllm_sparse_plugin.paged.attention import paged_maskers
from vllm_sparse_plugin.paged.device import indices as _registers_indices  # noqa: F401
from vllm_sparse_plugin.paged.device import maskers as _registers_maskers  # noqa: F401
from vllm_sparse_plugin.paged.device.cache import DeviceCache
from vllm_sparse_plugin.paged.device.indices.learned import DeviceLearnedIndex
from vllm_sparse_plugin.paged.device.maskers.base import DeviceMasker, device_masker
from vllm_sparse_plugin.paged.device.maskers.top_k import DeviceTopKMasker
from vllm_sparse_plugin.paged.device.queries import DeviceQueries
from vllm_sparse_plugin.paged.device.sequences import StepSequences
from vllm_sparse_plugin.paged.device.space import DeviceSpace
from vllm_sparse_plugin.paged.layout import BlockShape
from vllm_sparse_plugin.paged.learned_index import LearnedIndex
from vllm_sparse_plugin.paged.maskers.base import PagedMasker
from vllm_sparse_plugin.paged.triton_kernels.attention import AttentionWorkspace, attend_lists
from vllm_sparse_plugin.paged.triton_kernels.cache_rows import DeviceBatch, parts_for
from vllm_sparse_plugin.paged.triton_kernels.flags import start_flags
from vllm_sparse_plugin.paged.triton_kernels.key_ranges import MOST_RANGES
from vllm_sparse_plugin.paged.triton_kernels.lists import DeviceLists, list_tokens

KEYS_READ, ROWS_READ, ROWS_SCORED = 0, 1, 2
"""Columns of a query's counts: keys selected, summed over query heads; rows of key and value that
were loaded, over KV heads; rows of keys that were loaded in order to select."""


@dataclass(frozen=True)
class _Memory:
    """What the planner itself writes in a launch."""

    flags: torch.Tensor
    probability: torch.Tensor
    key_probability: torch.Tensor | None
    lists: DeviceLists
    attention: AttentionWorkspace

    @classmethod
    def of(
        cls,
        space: DeviceSpace,
        num_units: int,
        is_flagged: bool,
        is_sampled: bool,
        has_key_probabilities: bool,
    ) -> _Memory:
        shape = space.shape
        rows = space.max_queries * num_units
        flagged = rows if is_flagged else 0
        return cls(
            space.buffer("flags", flagged, space.capacity, dtype=torch.uint8),
            space.buffer("probability", flagged, dtype=torch.float32),
            space.buffer("key_probability", rows, space.capacity, dtype=torch.float32)
            if has_key_probabilities
            else None,
            space.scratch(
                DeviceLists.of,
                space.max_queries,
                shape.num_kv_heads,
                num_units // shape.num_kv_heads,
                space.capacity,
                is_sampled,
            ),
            space.scratch(
                AttentionWorkspace.of,
                space.max_queries,
                shape.num_heads,
                shape.num_kv_heads,
                shape.head_size,
                parts=parts_for(space.capacity),
            ),
        )


class DeviceAttention:
    """A list of maskers, applied to queries of any layer that has them.

    Attributes:
        maskers: In the order they are applied.
        paged: The same on CPUs.
        space: Memory of their launches, for no other list.
    """

    def __init__(self, configs: Sequence[MaskerConfig], space: DeviceSpace) -> None:
        """Builds the counterparts, and asks for all memory.

        Args:
            configs: At least one masker.
            space: Of the list.

        Raises:
            Unsupported: One of them has no counterpart; says which.
        """
        self.space = space
        self.paged = paged_maskers(configs, space.shape)
        self.maskers: list[DeviceMasker] = [device_masker(paged, space) for paged in self.paged]
        used = dict.fromkeys(index for paged in self.paged for index in paged.indices)
        self._learned = [index for index in used if isinstance(index, LearnedIndex)]
        by_head = any(paged.needs_query_heads for paged in self.paged)
        self._num_units = space.shape.num_heads if by_head else space.shape.num_kv_heads
        self._is_sampled = any(paged.samples for paged in self.paged)
        # One kernel for steps with dense queries among the others, and without.
        self._nothing = space.workspace(torch.zeros, space.max_queries, dtype=torch.int32)
        by_key = any(paged.has_key_probabilities for paged in self.paged)
        # The first maskers' ranges are marked by the launch that clears the flags.
        is_first = itertools.takewhile(lambda masker: masker.is_range, self.maskers)
        self._num_ranges = len(list(is_first))
        self._lister = self._only_lister()
        if self._lister is not None:
            self._lister.reserve_lists(space)
        self._memory = _Memory.of(
            space, self._num_units, self._lister is None, self._is_sampled, by_key
        )
        nothing = np.zeros(0, np.int64)
        counts = [len(masker.sizes(nothing)) for masker in self.maskers]
        ends = itertools.accumulate(counts, initial=0)
        self._parts = [slice(*pair) for pair in itertools.pairwise(ends)]

    def _only_lister(self) -> DeviceTopKMasker | None:
        """The masker besides ranges, if there is one, and it can list what is selected at once.

        Then no key needs a flag: see `triton_kernels.page_lists` and `triton_kernels.key_lists`.
        """
        others = self.maskers[self._num_ranges :]
        if len(others) == 1 and self._num_ranges <= MOST_RANGES and not self._is_sampled:
            (masker,) = others
            by_group = self._num_units == self.space.shape.num_kv_heads
            if isinstance(masker, DeviceTopKMasker) and by_group and masker.can_list:
                return masker
        return None

    @property
    def learns(self) -> bool:
        """Whether it needs to know the queries' sequences, see `attend`."""
        return bool(self._learned)

    @property
    def num_sizes(self) -> int:
        """Rows of `sizes`."""
        return int(self._parts[-1].stop)

    def sizes(self, lengths: np.ndarray) -> np.ndarray:
        """What follows from lengths alone; computed once per step, on the host.

        Args:
            lengths: `[num_queries]`, an integer type: keys that each query sees; 0 = padding.

        Returns:
            `[num_sizes, num_queries]`, int32.
        """
        lengths = lengths.astype(np.int64)
        rows = [row for masker in self.maskers for row in masker.sizes(lengths)]
        return np.array(rows, np.int32).reshape(self.num_sizes, len(lengths))

    def attend(
        self,
        query: torch.Tensor,
        cache: DeviceCache,
        batch: DeviceBatch,
        sizes: torch.Tensor,
        scaling: float,
        output: torch.Tensor,
        counts: torch.Tensor,
        sequences: StepSequences | None = None,
        whole: torch.Tensor | None = None,
        sink_logits: torch.Tensor | None = None,
    ) -> None:
        """Attention of each query over what the maskers select for it.

        It only launches: no value is looked at, and no memory asked for, unless sequences changed.

        Args:
            query: `[num_queries, num_heads, head_size]`, the heads of a query side by side.
            cache: Of the layer, with the indices that the maskers need.
            batch: Of the queries.
            sizes: `[num_sizes, num_queries]`, int32: see `sizes`.
            scaling: Of the scores.
            output: As `query`, contiguous; written, zeros for padding.
            counts: `[num_queries, 3]`, int64: added to, see `KEYS_READ`.
            sequences: Of the queries; needed if it `learns`.
            whole: `[num_queries]`, int32: see `attend_lists`. Such queries are in no count.
            sink_logits: `[num_heads]`, of learned attention sinks; None = the layer has none.
        """
        scaling *= cache.scales.key
        for index in self._learned:
            held = cache.indices[index]
            assert isinstance(held, DeviceLearnedIndex)
            assert sequences is not None
            held.prepare(cache.kv_cache, sequences)
        for start in range(0, len(query), self.space.max_queries):
            part = slice(start, start + self.space.max_queries)
            self._attend(
                query[part],
                cache,
                batch.part(part),
                sizes[:, part],
                scaling,
                output[part],
                counts[part],
                None if whole is None else whole[part],
                sink_logits,
            )

    def _attend(
        self,
        query: torch.Tensor,
        cache: DeviceCache,
        batch: DeviceBatch,
        sizes: torch.Tensor,
        scaling: float,
        output: torch.Tensor,
        counts: torch.Tensor,
        whole: torch.Tensor | None,
        sink_logits: torch.Tensor | None,
    ) -> None:
        memory = self._memory
        rows = len(query) * self._num_units
        queries = DeviceQueries(
            query=query,
            cache=cache,
            batch=batch,
            scaling=scaling,
            flags=memory.flags[:rows],
            probability=memory.probability[:rows],
            key_probability=memory.key_probability,
            reads=counts,
            space=self.space,
        )
        self._list(queries, sizes)
        lists = memory.lists
        attend_lists(
            query,
            cache.kv_cache,
            batch,
            lists.tokens,
            lists.log_weights,
            lists.counts,
            scaling,
            output,
            memory.attention,
            self._nothing[: len(query)] if whole is None else whole,
            sink_logits,
            cache.scales.value,
        )

    def _list(self, queries: DeviceQueries, sizes: torch.Tensor) -> None:
        """Writes the lists of the tokens that each KV head reads, and counts them."""
        memory, lengths = self._memory, queries.batch.lengths
        ranges = sizes[: 2 * self._num_ranges]
        if self._lister is not None:
            self._lister.list_selected(queries, ranges, sizes[len(ranges) :], memory.lists)
            return
        start_flags(queries.flags, lengths, ranges)
        if self._is_sampled:
            queries.probability.zero_()
        maskers = list(zip(self.maskers, self._parts, strict=True))
        for masker, part in maskers[self._num_ranges :]:
            masker.select(queries, sizes[part])
        list_tokens(
            queries.flags,
            lengths,
            memory.lists,
            queries.probability if self._is_sampled else None,
            memory.key_probability,
            reads=queries.reads,
            readers=self.space.shape.num_heads // self._num_units,
        )


def device_maskers(configs: Sequence[MaskerConfig], shape: BlockShape) -> list[PagedMasker]:
    """The paged maskers of a list that the device can serve too.

    Args:
        configs: At least one masker.
        shape: Of the cache.

    Raises:
        Unsupported: There are none, or one has no counterpart.
    """
    space = DeviceSpace(shape, 1, 16, 1, torch.device("meta"))
    return DeviceAttention(configs, space).paged
