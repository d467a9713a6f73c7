"""Memory that the layers of an engine use, one after the other."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, TypeVar

import torch

from vllm_sparse_plugin.paged.layout import BlockShape

Workspace = TypeVar("Workspace")


@dataclass
class DeviceSpace:
    """Buffers and workspaces for launches of so many queries; each is asked for once, by a name.

    Attributes:
        shape: Of the caches.
        max_queries: Queries of a launch.
        capacity: Keys that a query may see, a multiple of 16.
        max_tokens: New keys of a step.
        device: Of all memory.
        max_sequences: Sequences of which something learned is held.
    """

    shape: BlockShape
    max_queries: int
    capacity: int
    max_tokens: int
    device: torch.device
    max_sequences: int = 1
    _held: dict[Hashable, Any] = field(default_factory=dict)

    def buffer(self, name: str, *size: int, dtype: torch.dtype) -> torch.Tensor:
        """A tensor of that name, size and type, uninitialized."""
        tensor: torch.Tensor = self._get(
            (name, size, dtype), lambda: torch.empty(size, dtype=dtype, device=self.device)
        )
        return tensor

    def workspace(self, make: Callable[..., Workspace], *arguments: Any, **named: Any) -> Workspace:
        """`make(*arguments, device=..., **named)`, the same one for all who ask so."""
        key = (make, arguments, tuple(sorted(named.items())))
        made: Workspace = self._get(key, lambda: make(*arguments, device=self.device, **named))
        return made

    def _get(self, key: Hashable, make: Callable[[], Any]) -> Any:
        if key not in self._held:
            self._held[key] = make()
        return self._held[key]

    @property
    def num_bytes(self) -> int:
        """What is held."""
        return sum(tensor.nbytes for tensor in _tensors(list(self._held.values())))


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list):
        for part in value:
            yield from _tensors(part)
    elif is_dataclass(value) and not isinstance(value, type):
        for member in fields(value):
            yield from _tensors(getattr(value, member.name))


def queries_within(budget: int, most: int, bytes_of: Callable[[int], int]) -> int:
    """How many queries a launch may have for its memory to stay within a budget; at least 1.

    Args:
        budget: Bytes.
        most: Queries that are ever needed.
        bytes_of: Memory for launches of so many queries: an affine function.
    """
    each = bytes_of(2) - bytes_of(1)
    constant = bytes_of(1) - each
    return max(1, min(most, math.floor((budget - constant) / max(1, each))))
