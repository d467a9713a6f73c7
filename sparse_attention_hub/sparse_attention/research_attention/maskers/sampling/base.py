"""Bases of maskers that sample, and what a sample is to a mask."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sparse_attention_hub.sparse_attention.research_attention.maskers.base import (
    MaskerConfig,
    ResearchMasker,
)
from sparse_attention_hub.sparse_attention.research_attention.maskers.head_groups import (
    largest_of_groups,
    per_query_head,
)
from sparse_attention_hub.sparse_attention.research_attention.maskers.sampling.counter_random import (  # noqa: E501
    uniform_per_key,
)
from sparse_attention_hub.sparse_attention.research_attention.maskers.single_row import (
    exclude_selected,
    rows_of,
)
from sparse_attention_hub.sparse_attention.utils.mask import Mask


@dataclass(frozen=True)
class SamplingMaskerConfig(MaskerConfig):
    """Base of configurations of sampling maskers."""


class SamplingMasker(ResearchMasker):
    """A masker that selects keys at random.

    It samples from the visible keys that are not selected yet, and gives each its inclusion
    probability as weight, so that the attention over the mask is the inverse-probability estimate
    (Horvitz and Thompson 1952) of dense attention. One per `ResearchAttention`: two samples of the
    same keys have no single inclusion probability.
    """


def add_sampled(
    previous_mask: Mask, selected: torch.Tensor, probability: torch.Tensor | float
) -> Mask:
    """The union of a mask and a sample of keys that it does not select.

    Args:
        previous_mask: Not modified.
        selected: Boolean, of the mask's shape; nothing that `previous_mask` selects.
        probability: Inclusion probability of each, in (0, 1]; broadcastable to the mask's shape.
    """
    weights = previous_mask.get_dense_mask()
    probabilities = torch.as_tensor(probability, dtype=weights.dtype, device=weights.device)
    weights = torch.where(selected, probabilities, weights)
    return Mask.create_mask_from_dense_mask(previous_mask.shape, weights, previous_mask.dtype)


def pooled_mask(previous_mask: Mask, units: int) -> Mask:
    """A mask in which each query head has what any query head of its group selects.

    Args:
        previous_mask: `(B, H, Q, K)`; not modified.
        units: U, the groups; H itself returns `previous_mask`.

    Returns:
        `(B, H, Q, K)`; each key has the largest weight that a query head of the group gives it.
    """
    heads = previous_mask.shape[1]
    if units == heads or previous_mask.is_empty_mask():
        return previous_mask
    weights = per_query_head(largest_of_groups(previous_mask.get_dense_mask(), units), heads)
    return Mask.create_mask_from_dense_mask(previous_mask.shape, weights, previous_mask.dtype)


def unselected_in_random_order(
    previous_mask: Mask, seed: int, layer: int, units: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ranks the keys of a decode step's query by random numbers, selected ones last.

    Args:
        previous_mask: `(B, H, 1, K)`, by index; the same for all query heads of a unit.
        seed: Of the configuration.
        layer: Index of the attention layer.
        units: U, who draw: query heads, or KV heads with the numbers of their first query heads.

    Returns:
        float64 `(B, U, 1, K)`, -inf for selected keys, and how many are not selected, int64
        `(B, U, 1, 1)`. The largest n are a uniform sample of n unselected keys.
    """
    batch, heads, _, num_keys = previous_mask.shape
    group = heads // units
    rows = rows_of(previous_mask)
    position = torch.full((batch, 1, 1, 1), num_keys - 1, device=previous_mask.device)
    order = uniform_per_key(seed, layer, heads, position, num_keys, group).neg_()
    remaining = num_keys - (rows[1][:, ::group] > 0).sum(dim=-1, keepdim=True)
    return exclude_selected(order, *rows, never=-torch.inf), remaining


def checked_seed(seed: object) -> None:
    """Checks a seed of `counter_random`.

    Raises:
        ValueError: It is not an integer in [0, 2**63).
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 1 << 63:
        raise ValueError(f"seed must be an integer in [0, 2**63), got {seed!r}")
