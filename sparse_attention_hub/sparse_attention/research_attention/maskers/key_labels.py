"""What maskers keep about keys between decode steps: computed once per key, in key order.

A cache (`sparse_meta_data`) belongs to one sequence, or one batch of them: keys are only ever added
at its end. A call with as many queries as keys is the first of a sequence (see `start_anew`); one
with fewer keys than before, or with keys of another shape or place, starts anew too. That the old
keys are still the same is not checked, since that would read them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch


class LabelsByLayer(dict[int, Any]):
    """What a cache keeps under one name, by layer: made from keys, and of no use to other keys."""


def start_anew(sparse_meta_data: dict[Any, Any], layer_idx: int) -> None:
    """Forgets what was made from a layer's keys; what belongs to the layer itself stays."""
    for kept in sparse_meta_data.values():
        if isinstance(kept, LabelsByLayer):
            kept.pop(layer_idx, None)


class _GrowingLabels:
    """Labels along dimension 2, with room to append in place (amortised constant time)."""

    def __init__(self, labels: torch.Tensor) -> None:
        self._room = labels
        self.length = labels.shape[2]

    def append(self, labels: torch.Tensor) -> None:
        """Adds labels at the end."""
        length = self.length + labels.shape[2]
        if length > self._room.shape[2]:
            shape = list(labels.shape)
            shape[2] = 2 * length
            room = labels.new_empty(shape)
            room[:, :, : self.length] = self.labels
            self._room = room
        self._room[:, :, self.length : length] = labels
        self.length = length

    @property
    def labels(self) -> torch.Tensor:
        """All so far, without a copy."""
        return self._room[:, :, : self.length]


def labels_of_keys(
    sparse_meta_data: dict[Any, Any],
    name: Hashable,
    layer_idx: int,
    keys: torch.Tensor,
    label: Callable[[torch.Tensor], torch.Tensor],
    stride: int = 1,
    version: Hashable = None,
) -> torch.Tensor:
    """Labels of all keys; those of keys seen in an earlier call are taken from the cache.

    Args:
        sparse_meta_data: The cache.
        name: Of the labels, with all that they depend on besides the keys.
        layer_idx: Of the attention layer.
        keys: `(B, G, K, D)`.
        label: Gives `(B, *, m, *)` for keys `(B, G, m * stride, D)`.
        stride: Keys per label; a rest of less than `stride` keys gets none.
        version: Of what labels are made with; another one than before starts anew.

    Returns:
        `(B, *, K // stride, *)`, not to be written to.
    """
    state = sparse_meta_data.setdefault(name, LabelsByLayer())
    owner = (keys.shape[0], keys.shape[1], keys.shape[3], keys.dtype, keys.device, version)
    known = state.get(layer_idx)
    wanted = keys.shape[2] // stride
    if known is None or known[0] != owner or known[1].length > wanted:
        known = state[layer_idx] = (owner, _GrowingLabels(label(keys[:, :, : wanted * stride])))
    growing: _GrowingLabels = known[1]
    if growing.length < wanted:
        growing.append(label(keys[:, :, growing.length * stride : wanted * stride]))
    return growing.labels
