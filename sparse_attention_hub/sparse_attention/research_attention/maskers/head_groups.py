"""Query heads that select together: one unit of selection per KV head instead of per query head."""

from __future__ import annotations

import torch

HEAD_GRANULARITIES = ("query_head", "kv_head")
"""Who selects: each query head, or the query heads of a KV head together."""


def check_head_granularity(value: object) -> None:
    """Checks the field `head_granularity`.

    Raises:
        ValueError: It is not one of `HEAD_GRANULARITIES`.
    """
    if value not in HEAD_GRANULARITIES:
        raise ValueError(
            f"head_granularity must be one of {', '.join(HEAD_GRANULARITIES)}, got {value!r}"
        )


def selecting_units(head_granularity: str, num_heads: int, num_kv_heads: int) -> int:
    """How many selections there are per query, U: the query heads' or the KV heads' number."""
    return num_kv_heads if head_granularity == "kv_head" else num_heads


def pooled_scores(scores: torch.Tensor, units: int, scaling: float) -> torch.Tensor:
    """Scores of query heads as scores of the units that select together.

    A unit ranks keys by the mean, over its query heads, of the share of attention that each head's
    scores give the key. (On a small model, at 5 % density, that lost less than the mean or the
    maximum of the scores themselves: 9.2 % of the output's norm against 10.7 % and 10.4 %; heads
    that select for themselves lose 8.0 %.)

    Args:
        scores: `(B, H, Q, K)`; at most the dtype's minimum / 2 where a key is invisible.
        units: U, a divisor of H; H itself returns `scores`.
        scaling: Of the scores.

    Returns:
        `(B, U, Q, K)`.
    """
    if scores.shape[1] == units:
        return scores
    # Finite, so that a row without visible keys gives no NaN.
    logits = (scores * scaling).clamp(min=torch.finfo(scores.dtype).min / 2)
    return _grouped(logits.softmax(dim=-1), units).mean(dim=2)


def any_of_groups(candidates: torch.Tensor, units: int) -> torch.Tensor:
    """Boolean `(B, H, Q, K)` as `(B, U, Q, K)`: what at least one query head of a unit may take."""
    return candidates if candidates.shape[1] == units else _grouped(candidates, units).any(dim=2)


def most_of_groups(counts: int | torch.Tensor, units: int) -> int | torch.Tensor:
    """Counts `(B, 1 or H, Q, 1)` as `(B, 1 or U, Q, 1)`: the largest of a unit."""
    if isinstance(counts, int) or counts.shape[1] == 1:
        return counts
    return largest_of_groups(counts, units)


def largest_of_groups(values: torch.Tensor, units: int) -> torch.Tensor:
    """Values `(B, H, ...)` of query heads as `(B, U, ...)`: the largest of a unit."""
    return values if values.shape[1] == units else _grouped(values, units).amax(dim=2)


def per_query_head(selected: torch.Tensor, num_heads: int) -> torch.Tensor:
    """A selection `(B, U, ...)` of units, given to each of their query heads: `(B, H, ...)`."""
    units = selected.shape[1]
    return selected if units == num_heads else selected.repeat_interleave(num_heads // units, dim=1)


def _grouped(tensor: torch.Tensor, units: int) -> torch.Tensor:
    return tensor.reshape(tensor.shape[0], units, tensor.shape[1] // units, *tensor.shape[2:])
