"""Measured density: what the masks really selected, counted where they were applied."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

MAX_TAGS = 4096
"""Tagged requests that are remembered; the oldest is forgotten first."""


@dataclass
class ReadCount:
    """Counts of one request, or of all.

    Attributes:
        sparse_queries: Query tokens that attended sparsely, counted once (not per layer).
        dense_queries: Query tokens that attended densely.
        read_keys: Keys read by sparse queries, summed over layers and query heads.
        visible_keys: Keys a dense step would have read for the same queries, likewise.
    """

    sparse_queries: int = 0
    dense_queries: int = 0
    read_keys: int = 0
    visible_keys: int = 0

    def report(self) -> dict[str, Any]:
        """The counts, and the density of the sparse queries (1.0 when there were none)."""
        density = self.read_keys / self.visible_keys if self.visible_keys else 1.0
        return {
            "sparse_queries": self.sparse_queries,
            "dense_queries": self.dense_queries,
            "read_keys": self.read_keys,
            "visible_keys": self.visible_keys,
            "density": density,
        }


@dataclass
class Statistics:
    """The counts of one worker."""

    totals: ReadCount = field(default_factory=ReadCount)
    tagged: OrderedDict[str, ReadCount] = field(default_factory=OrderedDict)

    def _counts(self, tag: str | None) -> list[ReadCount]:
        if tag is None:
            return [self.totals]
        if tag not in self.tagged:
            self.tagged[tag] = ReadCount()
            if len(self.tagged) > MAX_TAGS:
                self.tagged.popitem(last=False)
        return [self.totals, self.tagged[tag]]

    def add_queries(self, tag: str | None, sparse: int, dense: int) -> None:
        """Counts one row of one step."""
        for count in self._counts(tag):
            count.sparse_queries += sparse
            count.dense_queries += dense

    def add_keys(self, tag: str | None, read: int, visible: int) -> None:
        """Counts one row of one layer."""
        for count in self._counts(tag):
            count.read_keys += read
            count.visible_keys += visible

    def report(self, tag: str | None = None) -> dict[str, Any] | None:
        """The counts of a tag (None: of all requests); None for a tag never seen."""
        if tag is None:
            return self.totals.report()
        return self.tagged[tag].report() if tag in self.tagged else None
