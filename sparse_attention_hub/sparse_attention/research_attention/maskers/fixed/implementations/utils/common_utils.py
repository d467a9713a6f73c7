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


def checked_integer(field: str, value: object, least: int, most: int | None = None) -> None:
    """Checks a whole number.

    Raises:
        ValueError: It is none, or outside [least, most]; names the field, the value and the range.
    """
    allowed = f">= {least}" if most is None else f"in [{least}, {most}]"
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    if not is_integer or value < least or (most is not None and value > most):  # type: ignore[operator]
        raise ValueError(f"{field} must be an integer {allowed}, got {value!r}")
