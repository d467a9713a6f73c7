"""Flat positions of a mask stored by index."""

from __future__ import annotations

import torch


def last_of_duplicates(
    indices: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions in ascending order, each with the weight that came last."""
    ordered, order = torch.sort(indices, stable=True)
    last = torch.ones_like(ordered, dtype=torch.bool)
    last[:-1] = ordered[1:] != ordered[:-1]
    return ordered[last], weights[order[last]]


def row_pointers(indices: torch.Tensor, rows: int, num_keys: int) -> torch.Tensor:
    """Offsets `(rows + 1,)` of the rows in ascending positions."""
    bounds = torch.arange(rows + 1, device=indices.device) * num_keys
    return torch.searchsorted(indices, bounds)


def rows_by_pointers(ptr: torch.Tensor, count: int) -> torch.Tensor:
    """The row of each of `count` positions, int64, as offsets of rows say it.

    Raises:
        ValueError: They do not lead from 0 to `count` in steps >= 0.
    """
    ptr = ptr.flatten().long()
    lengths = ptr.diff()
    if int(ptr[0]) != 0 or int(ptr[-1]) != count or bool((lengths < 0).any()):
        raise ValueError(f"ptr must lead from 0 to {count} without a step back")
    return torch.repeat_interleave(torch.arange(len(lengths), device=ptr.device), lengths)
