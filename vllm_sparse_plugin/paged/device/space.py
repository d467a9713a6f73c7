"""Memory that the lists of maskers of an engine use, one after the other."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, TypeVar

import torch

from vllm_sparse_plugin.paged.layout import BlockShape

Workspace = TypeVar("Workspace")
Made = TypeVar("Made")

_ALIGNMENT = 256
"""Bytes: what PyTorch's own allocator aligns to at least, so kernels may rely on as much."""
_META = torch.device("meta")


class DeviceMemory:
    """What the lists of maskers of an engine share, since one at a time is at work.

    Attributes:
        num_bytes: Of the scratch memory, which holds nothing from one launch of a list to the next.
        device: Of all memory.
        kept: Workspaces that launches leave as they have found them, see `DeviceSpace.workspace`.
    """

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        """Asks for no memory yet."""
        self.num_bytes = num_bytes
        self.device = device
        self.kept: dict[Hashable, Any] = {}

    @functools.cached_property
    def scratch(self) -> torch.Tensor:
        """`[num_bytes]`, uint8."""
        return torch.empty(self.num_bytes, dtype=torch.uint8, device=self.device)


@dataclass
class DeviceSpace:
    """Buffers and workspaces of one list of maskers, for launches of so many queries.

    Attributes:
        shape: Of the caches.
        max_queries: Queries of a launch.
        capacity: Keys that a query may see, a multiple of 16.
        max_tokens: New keys of a step.
        device: Of all memory.
        max_sequences: Sequences of which something learned is held.
        memory: That it shares with other lists; None: it has its own.
        scratch_bytes: Scratch memory that it has taken so far.
    """

    shape: BlockShape
    max_queries: int
    capacity: int
    max_tokens: int
    device: torch.device
    max_sequences: int = 1
    memory: DeviceMemory | None = None
    scratch_bytes: int = field(default=0, init=False)
    _held: dict[Hashable, Any] = field(default_factory=dict, init=False)

    def buffer(self, name: str, *size: int, dtype: torch.dtype) -> torch.Tensor:
        """Scratch of that name, size and type, uninitialized: other lists write there too."""
        return _made(self._held, (name, size, dtype), lambda: self._take(size, dtype))

    def scratch(self, make: Callable[..., Workspace], *arguments: Any, **named: Any) -> Workspace:
        """A workspace that holds nothing between launches: other lists write there too.

        Args:
            make: Gives a dataclass of tensors; takes a `device` as well.
            arguments: Of it; who asks with the same gets the same.
            named: Likewise.
        """

        def placed(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                return self._take(tuple(value.shape), value.dtype)
            if is_dataclass(value) and not isinstance(value, type):
                parts = {part.name: placed(getattr(value, part.name)) for part in fields(value)}
                return replace(value, **parts)
            return value

        key = (make, arguments, tuple(sorted(named.items())))
        made: Workspace = _made(
            self._held, key, lambda: placed(make(*arguments, device=_META, **named))
        )
        return made

    def workspace(self, make: Callable[..., Workspace], *arguments: Any, **named: Any) -> Workspace:
        """`make(*arguments, device=..., **named)`, which launches leave as they have found it."""
        key = (make, arguments, tuple(sorted(named.items())))
        kept = self._held if self.memory is None else self.memory.kept
        return _made(kept, key, lambda: make(*arguments, device=self.device, **named))

    def _take(self, size: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        begin = self.scratch_bytes
        end = begin + math.prod(size) * dtype.itemsize
        self.scratch_bytes = -(-end // _ALIGNMENT) * _ALIGNMENT
        if self.memory is None:
            return torch.empty(size, dtype=dtype, device=self.device)
        if end > self.memory.num_bytes:
            raise RuntimeError(
                f"{self.memory.num_bytes} bytes of scratch memory are not enough for {end}"
            )
        return self.memory.scratch[begin:end].view(dtype).view(size)


def _made(held: dict[Hashable, Any], key: Hashable, make: Callable[[], Made]) -> Made:
    """What is held under a key; made now, if nothing was."""
    if key not in held:
        held[key] = make()
    made: Made = held[key]
    return made


def queries_within(budget: int, most: int, bytes_of: Callable[[int], int]) -> int:
    """How many queries a launch may have for its memory to stay within a budget.

    Args:
        budget: Bytes.
        most: Queries that are ever needed, at least 1.
        bytes_of: Memory for launches of so many queries.

    Returns:
        `most`, or a power of 2 (so that lists have few sizes of what is kept between launches); 0
        where one query takes more.
    """
    queries = most
    while queries > 0 and bytes_of(queries) > budget:
        queries = (1 << (queries - 1).bit_length()) >> 1
    return queries
