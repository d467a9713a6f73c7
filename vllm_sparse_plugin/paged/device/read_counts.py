"""What the sparse queries of steps read, brought to the host without waiting for the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vllm_sparse_plugin.paged.attention import ReadCounts
from vllm_sparse_plugin.paged.device.attention import KEYS_READ, ROWS_READ, ROWS_SCORED
from vllm_sparse_plugin.paged.device.planner import LayerUse
from vllm_sparse_plugin.paged.group_counts import GroupCounts
from vllm_sparse_plugin.paged.layout import BlockShape
from vllm_sparse_plugin.statistics import Statistics


@dataclass(frozen=True)
class CountedGroup:
    """The sparse queries of one configuration in one step.

    Attributes:
        counts: Of the rows; layers on the general path have added theirs.
        places: `[num_queries]`: where their counts are among the step's.
        lengths: `[num_queries]`, int64: keys that each sees.
        use: What the layers do with the configuration.
    """

    counts: GroupCounts
    places: np.ndarray
    lengths: np.ndarray
    use: LayerUse

    def settle(self, values: np.ndarray, shape: BlockShape, statistics: Statistics) -> None:
        """Adds up all layers of the step.

        Args:
            values: `[>= num_queries, 3]`, int64, see `KEYS_READ`.
            shape: Of the cache.
            statistics: Where to.
        """
        use, own = self.use, values[self.places]
        for _ in range(use.dense_layers):
            self.counts.add_dense(shape)
        row_bytes = shape.key_value_bytes
        scanned = self.lengths * use.scanned_bytes_per_block // shape.block_size
        loaded = own[:, ROWS_READ] * row_bytes + own[:, ROWS_SCORED] * (row_bytes // 2) + scanned
        self.counts.add(ReadCounts(own[:, KEYS_READ], loaded), shape, layers=use.fast_layers)
        self.counts.settle(statistics)


@dataclass
class StepReads:
    """The counts of one step: on the device until they are fetched, then on their way."""

    groups: Sequence[CountedGroup]
    shape: BlockShape
    counts: torch.Tensor
    device: torch.device
    _fetched: torch.Tensor | None = None
    _arrived: Any = None  # torch's events have no types

    def fetch(self) -> None:
        """Starts to bring them to the host, once, and makes room for the next step's."""
        if self._fetched is not None:
            return
        is_cuda = self.device.type == "cuda"
        # The allocator of pinned memory takes care not to give it away too early.
        self._fetched = torch.empty(
            self.counts.shape, dtype=torch.int64, device="cpu", pin_memory=is_cuda
        )
        self._fetched.copy_(self.counts, non_blocking=True)
        if is_cuda:
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record()
        self.counts.zero_()

    @property
    def has_arrived(self) -> bool:
        """Whether `settle` need not wait."""
        return self._fetched is not None and (self._arrived is None or bool(self._arrived.query()))

    def settle(self, statistics: Statistics) -> None:
        """See `PendingCounts.settle`; waits for the device if the counts are still there."""
        self.fetch()
        assert self._fetched is not None
        if self._arrived is not None:
            self._arrived.synchronize()
        values = self._fetched.numpy()
        for group in self.groups:
            group.settle(values, self.shape, statistics)


@dataclass(frozen=True)
class StepCounter:
    """Where the layers of a KV cache group count what they read, step after step.

    Attributes:
        values: `[max_queries, 3]`, int64, on the device, see `KEYS_READ`.
        shape: Of the cache.
        statistics: Where the counts go in the end.
        device: Of the values.
    """

    values: torch.Tensor
    shape: BlockShape
    statistics: Statistics
    device: torch.device

    @classmethod
    def of(
        cls, max_queries: int, shape: BlockShape, statistics: Statistics, device: torch.device
    ) -> StepCounter:
        """Asks for the memory."""
        values = torch.zeros((max_queries, 3), dtype=torch.int64, device=device)
        return cls(values, shape, statistics, device)

    def open(self, groups: Sequence[CountedGroup], counts: torch.Tensor) -> None:
        """Notes a step whose layers will count what they read.

        Args:
            groups: Of the step.
            counts: The part of `values` that is theirs.
        """
        reads = StepReads(groups, self.shape, counts, self.device)
        self.statistics.pending.setdefault(id(self), []).append(reads)

    def collect(self) -> None:
        """Starts to fetch the counts of the former step, and takes in what has arrived."""
        pending = self.statistics.pending.get(id(self), [])
        for reads in pending:
            reads.fetch()
        while pending and pending[0].has_arrived:
            pending.pop(0).settle(self.statistics)

    def forget(self) -> None:
        """Between steps: what was counted since the last one is not anyone's."""
        self.values.zero_()
        self.statistics.pending.pop(id(self), None)
