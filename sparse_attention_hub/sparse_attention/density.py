"""How much of what a dense step reads a mask reads."""

from __future__ import annotations

import torch

from sparse_attention_hub.sparse_attention.utils.mask import Mask
from sparse_attention_hub.sparse_attention.visibility import visible_keys


def count_read_keys(mask: Mask, attention_mask: torch.Tensor | None) -> tuple[int, int]:
    """Counts keys that are read, and keys that a dense step would read.

    Args:
        mask: Of shape `(B, H, Q, K)`.
        attention_mask: As in `visible_keys`; invisible keys count in neither number.

    Returns:
        `(read, visible)`, both summed over all batch rows, query heads and queries. Density is
        their quotient.
    """
    *leading, num_keys = mask.shape
    visible = visible_keys(attention_mask, num_keys)
    rows = 1
    for size in leading:
        rows *= size
    if visible is None:
        total = rows * num_keys
        return (total, total) if mask.is_full_mask() else (mask.count_active(), total)
    visible = visible.expand(mask.shape)
    total = int(visible.sum())
    if mask.is_full_mask():
        return total, total
    return int(((mask.get_dense_mask() > 0) & visible).sum()), total
