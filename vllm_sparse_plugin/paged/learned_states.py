"""What was learned from keys, kept by what it was learned from."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable

import numpy as np

logger = logging.getLogger(__name__)

MAX_BYTES = 1 << 29
"""Of one index's states: 512 MiB. It is memory beside the KV cache, taken when it is needed."""


class LearnedStates:
    """A bounded memo: the states used last, at places of one array that kernels read.

    Nothing hangs on what it holds. A state that is not there is learned again from the same keys.

    Attributes:
        values: `[places, width]`, float32.
    """

    def __init__(self, width: int, max_bytes: int = MAX_BYTES) -> None:
        """Makes room, of which the system gives memory only to what is written.

        Args:
            width: float32s of a state.
            max_bytes: Of all states; one fits always.
        """
        self.values = np.empty((max(1, max_bytes // (4 * width)), width), np.float32)
        self._places: OrderedDict[bytes, int] = OrderedDict()
        self._has_forgotten = False

    def __len__(self) -> int:
        """How many states it holds."""
        return len(self._places)

    def place_of(self, name: bytes, learn: Callable[[], np.ndarray]) -> int:
        """The place of a state, which is learned if it is not there.

        It is right until as many other states as there are places were asked for.

        Args:
            name: Of what the state depends on.
            learn: Gives its numbers.
        """
        if name in self._places:
            self._places.move_to_end(name)
            return self._places[name]
        numbers = learn()
        if len(self._places) < len(self.values):
            place = len(self._places)
        else:
            if not self._has_forgotten:
                self._has_forgotten = True
                logger.warning(
                    "sparse attention: %d learned states are in use at once, %d are kept; the "
                    "others are learned again when they are needed",
                    len(self._places) + 1,
                    len(self.values),
                )
            _, place = self._places.popitem(last=False)
        self.values[place] = numbers.reshape(-1)
        self._places[name] = place
        return place

    def clear(self) -> None:
        """Forgets every state."""
        self._places.clear()
