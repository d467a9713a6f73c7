"""Quantisation of labels, as several maskers store them."""

from __future__ import annotations

import torch


def pseudo_quantize(tensor: torch.Tensor, num_bits: int) -> torch.Tensor:
    """What remains of values stored with few bits: rounded to levels between each row's extremes.

    Args:
        tensor: `(..., D)`; each last dimension has its own smallest and largest value.
        num_bits: Of one value, 1 to 16; 16 keeps the values as they are.

    Returns:
        Of the same shape and dtype.
    """
    if num_bits >= 16:
        return tensor
    levels = 2**num_bits - 1
    values = tensor.float()
    low, high = values.amin(dim=-1, keepdim=True), values.amax(dim=-1, keepdim=True)
    span = high - low
    step = torch.where(span > 0, span / levels, torch.ones_like(span))
    codes = ((values - low) / step).round().clamp(0, levels)
    return (codes * step + low).to(tensor.dtype)
