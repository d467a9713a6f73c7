"""Which keys a query may see at all, read from an attention mask."""

from __future__ import annotations

import torch


def visible_keys(attention_mask: torch.Tensor | None, num_keys: int) -> torch.Tensor | None:
    """The keys that each query may attend to.

    Args:
        attention_mask: `(B, 1 or H, Q, >= num_keys)`. Boolean: True = may attend. Additive: entries
            at or below half the dtype's minimum, -inf included, mean "may not" (two masks that
            were added up stay masks).
        num_keys: K.

    Returns:
        Boolean `(B, 1 or H, Q, num_keys)`; None when there is no mask and every key is visible.
    """
    if attention_mask is None:
        return None
    mask = attention_mask[..., :num_keys]
    if mask.dtype == torch.bool:
        return mask
    return mask > torch.finfo(mask.dtype).min / 2


def add_bias(scores: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """Scores plus an additive mask; a boolean mask adds nothing (see `visible_keys`).

    Args:
        scores: `(B, H, Q, K)`.
        attention_mask: As in `visible_keys`.
    """
    if attention_mask is None or attention_mask.dtype == torch.bool:
        return scores
    return scores + attention_mask[..., : scores.shape[-1]].to(scores.dtype)
