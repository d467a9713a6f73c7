"""Which sequences' codebooks and means are where, and which steps have to learn or to encode.

What is learned from the first keys of a sequence (see `learned_index`) lies at a *place* of every
layer's states. The host knows how long sequences are, and so it knows when a sequence has doubled,
or is new, or was dense for a while. Such a step learns, and encodes all keys that have no codes; it
runs without a CUDA graph of a whole step; so does one with more sequences than there are places.
All others make the codes of the keys that they bring, and nothing else.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from vllm_sparse_plugin.paged.triton_kernels.cache_rows import DeviceBatch
from vllm_sparse_plugin.step_plan import SparseRow

if TYPE_CHECKING:
    from vllm_sparse_plugin.row_table import Row


@dataclass(frozen=True)
class Change:
    """A sequence that needs more than the code of its last key.

    Attributes:
        number: Which of the step's sequences.
        place: Of its state.
        length: Keys that need codes.
        prefix: First keys that its state is to be learned from; 0: it is there.
    """

    number: int
    place: int
    length: int
    prefix: int


@dataclass(frozen=True)
class StepSequences:
    """The sequences of a launch's queries.

    Attributes:
        batch: One query per sequence: its last one.
        changes: Those that need more than the code of their last key.
    """

    batch: DeviceBatch
    changes: tuple[Change, ...] = ()


@dataclass
class _Known:
    """One sequence.

    Attributes:
        row: Of the request; it is held so that its identity is not given to another one.
        place: Of its state.
        prefix: First keys that its state was learned from; 0: of none yet.
        coded: Keys that got codes of that state, from the first one on. (Another sequence that
            shares their blocks may have replaced them: then they are made where they are used.)
    """

    row: Row
    place: int
    prefix: int = 0
    coded: int = 0


class SequenceStates:
    """What the layers of a KV cache group have learned, by request; the host's side of it.

    A request has one `Row` from when it enters the batch to when it leaves it, finished or
    preempted. So of one row keys are only ever added.
    """

    def __init__(self, places: int) -> None:
        """Knows nothing yet.

        Args:
            places: Sequences whose states are held; of others, those used last stay.
        """
        self.places = places
        self._known: OrderedDict[int, _Known] = OrderedDict()
        self._seen: dict[int, tuple[Row, int]] = {}

    def see(self, rows: Iterable[tuple[Row, int]]) -> None:
        """Notes the requests of a step, and how many keys each has after it."""
        self._seen = {id(row): (row, seq_len) for row, seq_len in rows}

    def next_length(self, row: Row) -> int | None:
        """Keys that a request's next query sees; None if it was not in the last step."""
        seen = self._seen.get(id(row))
        return None if seen is None else seen[1] + 1

    def knows(self, row: Row) -> bool:
        """Whether a request has a place."""
        return id(row) in self._known

    def has_all_but_the_last(self, row: Row, length: int) -> bool:
        """Whether the query that sees so many keys needs no more than the last one's code."""
        known = self._known.get(id(row))
        if known is None:
            return False
        return known.prefix == prefix_of(length) and known.coded == length - 1

    def take(self, rows: Sequence[tuple[Row, int, int]]) -> tuple[np.ndarray, tuple[Change, ...]]:
        """Plans a launch.

        Args:
            rows: At most as many as there are places: each request with the keys that its first and
                its last query sees, both of the same prefix.

        Returns:
            The places `[len(rows)]`, int32, and what has changed. It is taken for done.
        """
        assert len(rows) <= self.places
        found = [self._touched(row) for row, _, _ in rows]
        changes = []
        for number, (known, (_, first, last)) in enumerate(zip(found, rows, strict=True)):
            assert prefix_of(first) == prefix_of(last)
            prefix = prefix_of(last)
            is_new = known.prefix != prefix
            if is_new or first != last or known.coded != last - 1:
                change = Change(number, known.place, last, prefix if is_new else 0)
                changes.append(change)
            known.prefix, known.coded = prefix, last
        return np.array([known.place for known in found], np.int32), tuple(changes)

    def _touched(self, row: Row) -> _Known:
        known = self._known.get(id(row))
        if known is None:
            place = len(self._known)
            if place == self.places:
                _, oldest = self._known.popitem(last=False)
                place = oldest.place
            known = self._known[id(row)] = _Known(row, place)
        self._known.move_to_end(id(row))
        return known


def prefix_of(length: int) -> int:
    """From how many first keys the state of a query is learned that sees so many; see `key_prefix`.

    Args:
        length: At least 1.
    """
    return 1 << (length.bit_length() - 1)


def of_one_prefix(row: SparseRow) -> list[SparseRow]:
    """A row's queries in parts, in order, each of which has one prefix.

    Args:
        row: Of a step.
    """
    parts = []
    end, last = row.query_end, row.seq_len
    while end > row.query_start:
        count = min(end - row.query_start, last - prefix_of(last) + 1)
        parts.append(SparseRow(row.row, end - count, end, last, row.parameters))
        end, last = end - count, last - count
    return parts[::-1]
