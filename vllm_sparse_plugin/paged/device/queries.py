"""What maskers see of a layer's queries on the device, and how they select."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from vllm_sparse_plugin.paged.device.cache import DeviceCache
from vllm_sparse_plugin.paged.device.space import DeviceSpace
from vllm_sparse_plugin.paged.triton_kernels.cache_rows import DeviceBatch
from vllm_sparse_plugin.paged.triton_kernels.flags import flag_range, pool_flags, spread_flags
from vllm_sparse_plugin.paged.triton_kernels.pooling import PoolingWorkspace
from vllm_sparse_plugin.paged.triton_kernels.radix_workspace import RadixWorkspace
from vllm_sparse_plugin.paged.triton_kernels.row_selection import row_capacity
from vllm_sparse_plugin.paged.triton_kernels.selection import flag_largest


@dataclass(frozen=True)
class DeviceQueries:
    """Queries of one layer and step; see `PagedQueries`.

    Attributes:
        query: `[num_queries, num_heads, head_size]`, the heads of a query side by side.
        cache: Of the layer.
        batch: What they see.
        scaling: Of the scores.
        flags: `[num_queries * num_units, capacity]`, uint8. Maskers write it; empty where keys are
            listed at once, see `DeviceTopKMasker.can_list`.
        probability: `[num_queries * num_units]`, float32. Samplers write it.
        key_probability: `[>= num_queries * num_units, capacity]`, float32, of keys that are sampled
            with a probability of their own, or None; see `PagedMasker.has_key_probabilities`.
        reads: `[num_queries, 3]`, int64, see `triton_kernels.read_counts`. Maskers that load some
            keys in order to select add to it.
        space: Where workspaces are.
    """

    query: torch.Tensor
    cache: DeviceCache
    batch: DeviceBatch
    scaling: float
    flags: torch.Tensor
    probability: torch.Tensor
    key_probability: torch.Tensor | None
    reads: torch.Tensor
    space: DeviceSpace

    def scores(self, page_size: int = 1) -> torch.Tensor:
        """Scratch for a score per page, `[num_queries, num_heads, pages]`, float32."""
        space, num_heads = self.space, self.query.shape[1]
        pages = pages_of(space, page_size)
        held = scores_buffer(space, page_size)
        return held[: len(self.query) * num_heads * pages].view(-1, num_heads, pages)

    def add_range(self, begins: torch.Tensor, ends: torch.Tensor) -> None:
        """Selects keys at positions [begin, end) of each query; both int32 `[num_queries]`."""
        flag_range(self.flags, self.batch.lengths, begins, ends)

    def add_largest(
        self, scores: torch.Tensor, page_size: int, head_granularity: str, counts: torch.Tensor
    ) -> None:
        """Selects the pages with the highest scores that are not all selected.

        Args:
            scores: See `scores`; overwritten.
            page_size: Keys of a page.
            head_granularity: Who selects, see `head_groups`.
            counts: `[num_queries]`, int32, pages to select.
        """
        shape = self.cache.layout.shape
        by_group = head_granularity == "kv_head"
        flag_largest(
            scores,
            page_size,
            shape.num_kv_heads if by_group else shape.num_heads,
            counts,
            self.scaling,
            self.batch.lengths,
            self.flags,
            radix_workspace(self.space),
            pooling_workspace(self.space, page_size) if by_group else None,
        )

    @contextmanager
    def as_units_of(self, head_granularity: str) -> Iterator[DeviceQueries]:
        """See `PagedQueries.as_units_of`."""
        pooled = len(self.query) * self.cache.layout.shape.num_kv_heads
        if head_granularity == "query_head" or len(self.flags) == pooled:
            yield self
            return
        flags, probability = pooled_units(self.space)
        units = replace(self, flags=flags[:pooled], probability=probability[:pooled])
        units.probability.zero_()
        pool_flags(self.flags, self.batch.lengths, units.flags)
        yield units
        spread_flags(units.flags, self.batch.lengths, self.flags)
        self.probability.view(pooled, -1).copy_(units.probability[:, None])


def scores_buffer(space: DeviceSpace, page_size: int) -> torch.Tensor:
    """Memory for the scores of as many queries as a launch may have."""
    size = space.max_queries * space.shape.num_heads * pages_of(space, page_size)
    return space.buffer("scores", size, dtype=torch.float32)


def pages_of(space: DeviceSpace, page_size: int) -> int:
    """That there are scores for: of the longest sequence, and some more, see `row_capacity`."""
    return row_capacity(space.capacity, page_size)


def radix_workspace(space: DeviceSpace) -> RadixWorkspace:
    """For rows of scores that are split."""
    return space.workspace(RadixWorkspace.of)


def pooling_workspace(space: DeviceSpace, page_size: int) -> PoolingWorkspace:
    """For scores that are pooled over a group."""
    return space.scratch(
        PoolingWorkspace.of,
        space.max_queries,
        space.shape.num_heads,
        pages_of(space, page_size),
    )


def pooled_units(space: DeviceSpace) -> tuple[torch.Tensor, torch.Tensor]:
    """Flags and probabilities of KV heads, where other maskers select per query head."""
    units = space.max_queries * space.shape.num_kv_heads
    flags = space.buffer("pooled_flags", units, space.capacity, dtype=torch.uint8)
    return flags, space.buffer("pooled_probability", units, dtype=torch.float32)
