"""Resources that several users share, counted."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from datetime import datetime
from typing import Generic, Protocol, TypeVar

from sparse_attention_hub.adapters.utils.exceptions import (
    ReferenceCountError,
    ResourceCleanupError,
)

logger = logging.getLogger(__name__)


class Counted(Protocol):
    """An entry with a count of its users."""

    reference_count: int
    last_access_time: datetime


Entry = TypeVar("Entry", bound=Counted)


class _Slot(Generic[Entry]):
    """The place of one key: loading and freeing it blocks nobody who wants another key."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.entry: Entry | None = None


class SharedResources(Generic[Entry]):
    """Entries by key, each created on first use and freed when nobody uses it.

    Raises of `release` and `free`: `ReferenceCountError` for a release too many,
    `ResourceCleanupError` when freeing fails.
    """

    def __init__(
        self,
        resource_type: str,
        delete: Callable[[Entry], None],
        reclaim: Callable[[], None] = lambda: None,
    ) -> None:
        """Starts empty.

        Args:
            resource_type: For messages.
            delete: Frees what an entry's resource holds beyond Python's own references.
            reclaim: Called when nothing here refers to the entry any more.
        """
        self._resource_type = resource_type
        self._delete = delete
        self._reclaim = reclaim
        self._lock = threading.Lock()
        self._slots: dict[str, _Slot[Entry]] = {}

    def _slot(self, key: str) -> _Slot[Entry]:
        with self._lock:
            return self._slots.setdefault(key, _Slot())

    def entries(self) -> dict[str, Entry]:
        """The entries that exist now, as a copy."""
        with self._lock:
            slots = dict(self._slots)
        return {key: slot.entry for key, slot in slots.items() if slot.entry is not None}

    def acquire(self, key: str, create: Callable[[], Entry]) -> Entry:
        """The entry with one user more; created with `create` (no users yet) when it is new."""
        slot = self._slot(key)
        with slot.lock:
            if slot.entry is None:
                slot.entry = create()
            slot.entry.reference_count += 1
            slot.entry.last_access_time = datetime.now()
            return slot.entry

    def release(self, key: str, delete_on_zero: bool) -> bool:
        """One user less; False for an unknown key."""
        slot = self._slot(key)
        with slot.lock:
            entry = slot.entry
            if entry is None:
                logger.warning("release of an unknown %s: %s", self._resource_type, key)
                return False
            if entry.reference_count < 1:
                raise ReferenceCountError(key, "decrement", entry.reference_count)
            entry.reference_count -= 1
            if entry.reference_count > 0 or not delete_on_zero:
                return True
            del entry
            self._free(key, slot)
            return True

    def free(self, key: str, force: bool) -> bool:
        """Frees an entry; one in use only by `force`. False when it was not freed."""
        slot = self._slot(key)
        with slot.lock:
            if slot.entry is None:
                return False
            users = slot.entry.reference_count
            if users > 0:
                verb = "freeing" if force else "not freeing"
                logger.warning("%s %s %s: %d users", verb, self._resource_type, key, users)
                if not force:
                    return False
            self._free(key, slot)
            return True

    def free_all(self, force: bool) -> dict[str, int]:
        """Frees every entry; those in use only by `force`."""
        freed = [self.free(key, force) for key in self.entries()]
        return {"deleted": sum(freed), "skipped": len(freed) - sum(freed)}

    def free_unused(self) -> dict[str, int]:
        """Frees every entry without users."""
        unused = [key for key, entry in self.entries().items() if entry.reference_count == 0]
        freed = [self.free(key, force=False) for key in unused]
        return {"deleted": sum(freed), "skipped": len(freed) - sum(freed)}

    def _free(self, key: str, slot: _Slot[Entry]) -> None:
        entry, slot.entry = slot.entry, None
        assert entry is not None
        try:
            self._delete(entry)
            del entry
            self._reclaim()
        except Exception as error:
            raise ResourceCleanupError(key, self._resource_type, error) from error

    def stats(self) -> tuple[int, int, int, list[str]]:
        """Entries, users, entries without users, keys."""
        entries = self.entries()
        counts = [entry.reference_count for entry in entries.values()]
        return len(entries), sum(counts), counts.count(0), list(entries)
