"""Measured density: what the masks really selected, counted where they were applied."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Protocol

MAX_TAGS = 4096
"""Tagged requests that are remembered; the oldest is forgotten first."""


@dataclass
class ReadCount:
    """Counts of one request, or of all.

    Attributes:
        sparse_queries: Query tokens that attended sparsely, counted once (not per layer).
        dense_queries: Query tokens that attended densely.
        automatic_dense_queries: Those of them that did because so few keys, or the whole step's,
            are not worth maskers.
        fallback_queries: Those of them that did because the engine cannot serve them sparsely
            (speculative decoding).
        read_keys: Keys read by sparse queries, summed over layers and query heads.
        visible_keys: Keys a dense step would have read for the same queries, likewise.
        read_bytes: Bytes of keys, values and index that were loaded for them, summed over layers.
        visible_bytes: Bytes of keys and values that a dense step would have loaded.
        general_rows: Rows (a request's queries in a step) times layers that the general path
            served, because the fast one could not.
    """

    sparse_queries: int = 0
    dense_queries: int = 0
    automatic_dense_queries: int = 0
    fallback_queries: int = 0
    read_keys: int = 0
    visible_keys: int = 0
    read_bytes: int = 0
    visible_bytes: int = 0
    general_rows: int = 0

    def report(self) -> dict[str, Any]:
        """The counts, and the density of the sparse queries (1.0 when there were none)."""
        density = self.read_keys / self.visible_keys if self.visible_keys else 1.0
        return {**asdict(self), "density": density}


_NAMES = tuple(member.name for member in fields(ReadCount))


class PendingCounts(Protocol):
    """Counts of a step that its layers still add to."""

    @property
    def has_arrived(self) -> bool:
        """Whether `settle` need not wait for a device."""

    def fetch(self) -> None:
        """Starts to bring them to the host; layers have added all there is."""

    def settle(self, statistics: Statistics) -> None:
        """Adds them up, per request."""


@dataclass
class Statistics:
    """The counts of one worker."""

    totals: ReadCount = field(default_factory=ReadCount)
    tagged: OrderedDict[str, ReadCount] = field(default_factory=OrderedDict)
    pending: dict[int, list[PendingCounts]] = field(default_factory=dict)

    def settle(self, owner: int | None = None) -> None:
        """Takes in what steps have counted by themselves.

        Args:
            owner: Who planned those steps, each for its own layers; None = everyone. None of their
                steps may be running.
        """
        for key in list(self.pending) if owner is None else [owner]:
            waiting = self.pending.get(key, [])
            while waiting:
                waiting[0].settle(self)
                waiting.pop(0)  # not before: they may not be there to be had
            self.pending.pop(key, None)

    def _counts(self, tag: str | None) -> list[ReadCount]:
        if tag is None:
            return [self.totals]
        if tag in self.tagged:
            self.tagged.move_to_end(tag)
        else:
            self.tagged[tag] = ReadCount()
            if len(self.tagged) > MAX_TAGS:
                self.tagged.popitem(last=False)
        return [self.totals, self.tagged[tag]]

    def add_queries(
        self, tag: str | None, sparse: int, dense: int, automatic: int = 0, fallback: int = 0
    ) -> None:
        """Counts one row of one step."""
        self.add(
            tag,
            ReadCount(
                sparse_queries=sparse,
                dense_queries=dense,
                automatic_dense_queries=automatic,
                fallback_queries=fallback,
            ),
        )

    def add_keys(self, tag: str | None, read: int, visible: int) -> None:
        """Counts one row of one layer."""
        self.add(tag, ReadCount(read_keys=read, visible_keys=visible))

    def add(self, tag: str | None, more: ReadCount) -> None:
        """Adds counts of one request."""
        for count in self._counts(tag):
            for name in _NAMES:
                setattr(count, name, getattr(count, name) + getattr(more, name))

    def report(self, tag: str | None = None) -> dict[str, Any] | None:
        """The counts of a tag (None: of all requests); None for a tag never seen."""
        self.settle()
        if tag is None:
            return self.totals.report()
        return self.tagged[tag].report() if tag in self.tagged else None
