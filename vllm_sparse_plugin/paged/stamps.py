"""Numbers that are drawn once: names for contents that nothing else has."""

from __future__ import annotations

import secrets
import threading


class StampCounter:
    """Counts on and on, from a random number: another process' stamps are others too.

    (Blocks that another process wrote may be loaded from a store, with their stamps.)
    """

    def __init__(self) -> None:
        """Chooses where to start."""
        self._next = secrets.randbits(64)
        self._lock = threading.Lock()

    def draw(self, count: int) -> int:
        """The first of `count` new numbers in a row, an int64; the lowest follows the highest."""
        with self._lock:
            first = self._next
            self._next = (first + count) % (1 << 64)
        return first - (1 << 63)


STAMPS = StampCounter()
"""The process' own."""
