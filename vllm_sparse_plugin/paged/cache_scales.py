"""With which scales keys and values are stored in 8 bits."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CacheScales:
    """What a model's keys and values are divided by before they are stored in 8 bits.

    Attributes:
        key: Of keys, and so of what indices hold of them.
        value: Of values.
    """

    key: float = 1.0
    value: float = 1.0


UNSCALED = CacheScales()
