"""Selection by index, where one query per sequence sees every key: a decode step.

Then a selection is a list of key positions per query head, and nothing of the size of all keys is
written but the scores themselves. The general case (several queries, or an attention mask) works on
boolean tensors of the whole shape; both select the same keys.

Nothing here reads a number back from the device.
"""

from __future__ import annotations

import torch

from sparse_attention_hub.sparse_attention.research_attention.maskers.head_groups import (
    per_query_head,
)
from sparse_attention_hub.sparse_attention.utils.mask import Mask

_NEVER = torch.iinfo(torch.int64).min


def is_single_row(previous_mask: Mask, attention_mask: torch.Tensor | None) -> bool:
    """Whether the functions below apply: one query, every key visible, a selection by index."""
    return (
        attention_mask is None and previous_mask.shape[2] == 1 and previous_mask.rows() is not None
    )


def add_range(previous_mask: Mask, start: int, stop: int) -> Mask:
    """The union of a mask and the keys at positions [start, stop).

    Args:
        previous_mask: `(B, H, 1, K)`, by index; not modified.
        start: At least 0.
        stop: At most K.
    """
    if stop <= start:
        return previous_mask
    indices, weights = rows_of(previous_mask)
    outside = (indices < start) | (indices >= stop)
    span = torch.arange(start, stop, device=indices.device).expand(*indices.shape[:-1], -1)
    return _joined(previous_mask, indices, weights * outside, span, torch.ones_like(span))


def add_top(previous_mask: Mask, scores: torch.Tensor, count: int) -> Mask:
    """The union of a mask and the `count` unselected keys with the highest scores.

    Equal scores: the lower position wins.

    Args:
        previous_mask: `(B, H, 1, K)`, by index; not modified.
        scores: float32 `(B, U, 1, K)`. U = H: each query head selects for itself. U = KV heads: the
            query heads of a group get the same keys, out of those that not all of them have.
        count: Keys to add, at most K.
    """
    if count <= 0:
        return previous_mask
    indices, weights = rows_of(previous_mask)
    units = scores.shape[1]
    order = exclude_selected(_ordered(scores), indices, weights, _NEVER)
    best = order.topk(count, dim=-1, sorted=False)
    return _joined_units(previous_mask, indices, weights, best, units)


def _joined_units(
    previous_mask: Mask,
    indices: torch.Tensor,
    weights: torch.Tensor,
    best: torch.return_types.topk,
    units: int,
) -> Mask:
    heads = previous_mask.shape[1]
    group = heads // units
    valid = best.values != _NEVER
    if group > 1:
        # A head may have some of the group's keys already; certainty replaces its probability.
        chosen = torch.zeros(
            *best.indices.shape[:-1], previous_mask.shape[-1], dtype=torch.bool, device=valid.device
        ).scatter_(-1, best.indices, valid)
        chosen = chosen.repeat_interleave(group, dim=1)
        weights = weights * ~chosen.gather(-1, indices)
    added = best.indices.repeat_interleave(group, dim=1)
    return _joined(previous_mask, indices, weights, added, valid.repeat_interleave(group, dim=1))


def exclude_selected(
    order: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor, never: float
) -> torch.Tensor:
    """An order of keys in which those that are selected come last.

    Args:
        order: `(B, U, 1, K)`, changed in place.
        indices: `(B, H, 1, n)` key positions, H a multiple of U.
        weights: `(B, H, 1, n)`; 0 = no key.
        never: Written where every query head of a group has selected the key.

    Returns:
        `order`.
    """
    batch, units, _, _ = order.shape
    group = indices.shape[1] // units
    # Heads of one group side by side: a key is out when all of them have it.
    held = torch.zeros(order.shape, dtype=torch.int16, device=order.device)
    held.scatter_add_(
        -1,
        indices.reshape(batch, units, 1, -1),
        (weights > 0).to(torch.int16).reshape(batch, units, 1, -1),
    )
    return order.masked_fill_(held == group, never)


def pooled_rows(previous_mask: Mask, units: int) -> Mask:
    """Gives what one query head selected to all query heads of its group.

    Args:
        previous_mask: `(B, H, 1, K)`, by index; not modified.
        units: U, the groups; H itself returns `previous_mask`.

    Returns:
        A mask by index; each key has the largest weight that a query head of the group gives it.
    """
    batch, heads, _, num_keys = previous_mask.shape
    if units == heads:
        return previous_mask
    # Heads of one group side by side: a key may be listed once by each of them.
    indices, weights = (rows.reshape(batch, units, 1, -1) for rows in rows_of(previous_mask))
    shape, length = (batch, units, 1, num_keys), indices.shape[-1]
    largest = weights.new_zeros(shape).scatter_reduce_(-1, indices, weights, "amax")
    weights = largest.gather(-1, indices) * (weights > 0)
    places = torch.arange(length, device=indices.device).expand_as(indices)
    places = places.masked_fill(weights == 0, length)
    first = torch.full(shape, length, device=indices.device)
    first.scatter_reduce_(-1, indices, places, "amin")
    weights = weights * (places == first.gather(-1, indices))
    if indices.device.type == "cpu":  # elsewhere the lists' length would have to be read back
        most = int((weights > 0).sum(dim=-1).max())
        order = (weights == 0).to(torch.uint8).argsort(dim=-1, stable=True)[..., :most]
        indices, weights = indices.gather(-1, order), weights.gather(-1, order)
    return Mask.create_from_rows(
        previous_mask.shape, per_query_head(indices, heads), per_query_head(weights, heads)
    )


def add_weighted(previous_mask: Mask, indices: torch.Tensor, weights: torch.Tensor) -> Mask:
    """The union of a mask and keys that it does not select.

    Args:
        previous_mask: `(B, H, 1, K)`, by index; not modified.
        indices: `(B, H, 1, n)` key positions.
        weights: `(B, H, 1, n)` probabilities; 0 = no key.
    """
    return _joined(previous_mask, *rows_of(previous_mask), indices, weights)


def rows_of(mask: Mask) -> tuple[torch.Tensor, torch.Tensor]:
    """Key positions and weights of a mask by index, as `is_single_row` has found it to be."""
    rows = mask.rows()
    assert rows is not None  # is_single_row said so
    return rows


def _joined(
    mask: Mask,
    indices: torch.Tensor,
    weights: torch.Tensor,
    more_indices: torch.Tensor,
    more_weights: torch.Tensor,
) -> Mask:
    return Mask.create_from_rows(
        mask.shape,
        torch.cat([indices, more_indices], dim=-1),
        torch.cat([weights, more_weights.to(weights.dtype)], dim=-1),
    )


def _ordered(scores: torch.Tensor) -> torch.Tensor:
    """Distinct int64 that rank as (score, lower position first): the float's bits, then place."""
    bits = (scores + 0.0).view(torch.int32)  # + 0.0: -0.0 equals 0.0
    ranked = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    places = torch.arange(scores.shape[-1] - 1, -1, -1, device=scores.device)
    return (ranked.long() << 32) | places
