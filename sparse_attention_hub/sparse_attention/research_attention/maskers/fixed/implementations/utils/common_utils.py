"""What several maskers share: quantisation of labels, checks of whole numbers."""

from __future__ import annotations

import numbers
from typing import Any

import torch

from sparse_attention_hub.sparse_attention.research_attention.maskers.sizes import (
    check_not_too_large,
)


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


def checked_integer(field: str, value: object, least: int, most: int | None = None) -> int:
    """A whole number as a plain int; NumPy's are whole numbers too.

    Raises:
        ValueError: It is none, or outside [least, most] (None = `LARGEST`); names the field, the
            value and the range.
    """
    allowed = f">= {least}" if most is None else f"in [{least}, {most}]"
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise ValueError(f"{field} must be an integer {allowed}, got {value!r}")
    number = int(value)
    if number < least or (most is not None and number > most):
        raise ValueError(f"{field} must be an integer {allowed}, got {value!r}")
    check_not_too_large(field, number)
    return number


def check_integer_field(config: Any, field: str, least: int, most: int | None = None) -> None:
    """Checks a whole number of a frozen configuration, and makes it a plain int.

    Raises:
        ValueError: See `checked_integer`.
    """
    object.__setattr__(config, field, checked_integer(field, getattr(config, field), least, most))
