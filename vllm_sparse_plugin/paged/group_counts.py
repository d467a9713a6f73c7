"""What the sparse queries of a step read, added up over layers without work per request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vllm_sparse_plugin.paged.attention import ReadCounts
from vllm_sparse_plugin.paged.layout import BlockShape
from vllm_sparse_plugin.statistics import ReadCount, Statistics
from vllm_sparse_plugin.step_plan import SparseRow


@dataclass
class GroupCounts:
    """Counts per row; a row's queries are side by side.

    Attributes:
        tags: Of the rows' requests.
        starts: `[num_rows]`: where each row's queries begin.
        lengths: `[num_rows]`, int64: keys that each row's queries see, summed.
        keys: `[num_rows]`, int64: keys read, summed over layers and query heads.
        visible: Likewise: keys that dense attention would have read.
        read_bytes: `[num_rows]`, int64: loaded, summed over layers.
        visible_bytes: Likewise.
        general: `[num_rows]`, int64: layers served by the general path.
    """

    tags: tuple[str | None, ...]
    starts: np.ndarray
    lengths: np.ndarray
    keys: np.ndarray
    visible: np.ndarray
    read_bytes: np.ndarray
    visible_bytes: np.ndarray
    general: np.ndarray

    @classmethod
    def of(cls, rows: Sequence[SparseRow]) -> GroupCounts:
        """Zeros for some rows."""
        counts = np.array([row.query_end - row.query_start for row in rows], np.int64)
        last = np.array([row.seq_len for row in rows], np.int64)
        zeros = np.zeros((5, len(rows)), np.int64)
        return cls(
            tuple(row.parameters.tag for row in rows),
            np.concatenate([[0], counts.cumsum()[:-1]]),
            counts * last - counts * (counts - 1) // 2,
            *zeros,
        )

    def _add_visible(self, shape: BlockShape, layers: int = 1) -> None:
        lengths = self.lengths * layers
        self.visible += lengths * shape.num_heads
        self.visible_bytes += lengths * (shape.num_kv_heads * shape.key_value_bytes)

    def add(self, read: ReadCounts, shape: BlockShape, layers: int = 1) -> None:
        """Counts layers of the fast path.

        Args:
            read: Summed over them.
            shape: Of the cache.
            layers: How many.
        """
        self._add_visible(shape, layers)
        self.keys += np.add.reduceat(read.keys, self.starts)
        self.read_bytes += np.add.reduceat(read.loaded_bytes, self.starts)

    def add_dense(self, shape: BlockShape) -> None:
        """Counts a layer that reads everything."""
        self._add_visible(shape)
        self.keys += self.lengths * shape.num_heads
        self.read_bytes += self.lengths * (shape.num_kv_heads * shape.key_value_bytes)

    def add_general(self, place: int, read: int, visible: int, shape: BlockShape) -> None:
        """Counts a layer and row of the general path, which loads every key."""
        loaded = int(self.lengths[place]) * shape.num_kv_heads * shape.key_value_bytes
        self.keys[place] += read
        self.visible[place] += visible
        self.read_bytes[place] += loaded
        self.visible_bytes[place] += loaded
        self.general[place] += 1

    @property
    def has_arrived(self) -> bool:
        """True: they are the host's."""
        return True

    def fetch(self) -> None:
        """Nothing to do."""

    def settle(self, statistics: Statistics) -> None:
        """See `PendingCounts.settle`."""
        for place, tag in enumerate(self.tags):
            statistics.add(
                tag,
                ReadCount(
                    read_keys=int(self.keys[place]),
                    visible_keys=int(self.visible[place]),
                    read_bytes=int(self.read_bytes[place]),
                    visible_bytes=int(self.visible_bytes[place]),
                    general_rows=int(self.general[place]),
                ),
            )
