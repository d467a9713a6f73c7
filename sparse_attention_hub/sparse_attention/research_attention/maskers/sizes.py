"""Sizes of selections: a number of keys, or a share of the keys that a query may see."""

from __future__ import annotations

import numbers
from typing import TypeAlias, overload

import torch

from sparse_attention_hub.sparse_attention.visibility import visible_keys

Size: TypeAlias = "int | float"

LARGEST = 2**31 - 1
"""Of whole numbers in configurations: kernels and tensors hold no larger ones."""


def checked_size(field: str, value: object) -> Size:
    """A size as a plain int or float.

    Args:
        field: Its name, for the error.
        value: An integer in [1, 2**31) (keys), or a float in (0, 1] (share of the visible keys).

    Raises:
        ValueError: It is neither; the message names the field, the value and what is allowed.
    """
    if isinstance(value, bool):  # an int to Python, a mistake here
        number: Size | None = None
    elif isinstance(value, numbers.Integral):
        number = int(value)
        check_not_too_large(field, number)
        number = number if number >= 1 else None
    elif isinstance(value, numbers.Real):
        number = float(value)
        number = number if 0.0 < number <= 1.0 else None  # not NaN, not infinite
    else:
        number = None
    if number is not None:
        return number
    raise ValueError(
        f"{field} must be an integer >= 1 (keys) or a float in (0, 1] (share of the keys that a "
        f"query may see), got {value!r}"
    )


def check_not_too_large(field: str, value: int) -> None:
    """Refuses whole numbers that a tensor of int32 cannot hold.

    Raises:
        ValueError: The value is above `LARGEST`; the message names both and the field.
    """
    if value > LARGEST:
        raise ValueError(f"{field} must be an integer <= {LARGEST}, got {value!r}")


@overload
def resolve_size(size: Size, num_keys: int) -> int: ...


@overload
def resolve_size(size: Size, num_keys: torch.Tensor) -> torch.Tensor: ...


@overload
def resolve_size(size: Size, num_keys: int | torch.Tensor) -> int | torch.Tensor: ...


def resolve_size(size: Size, num_keys: int | torch.Tensor) -> int | torch.Tensor:
    """A size in keys, at most `num_keys`; shares are rounded down.

    Args:
        size: As checked by `checked_size`.
        num_keys: Keys that a query may see; an int, or an int64 tensor of one count per row.
    """
    if isinstance(num_keys, int):
        return min(int(size * num_keys) if isinstance(size, float) else size, num_keys)
    if isinstance(size, float):
        # float64, as Python multiplies, so that a row gives what the number alone gives.
        return (num_keys.double() * size).floor().long()
    return num_keys.clamp(max=size)


def visible_counts(attention_mask: torch.Tensor | None, num_keys: int) -> int | torch.Tensor:
    """How many keys each query may see.

    Returns:
        `num_keys` when there is no mask, else int64 `(B, 1 or H, Q, 1)`.
    """
    visible = visible_keys(attention_mask, num_keys)
    return num_keys if visible is None else visible.sum(dim=-1, keepdim=True)


def first_visible(attention_mask: torch.Tensor | None, num_keys: int) -> torch.Tensor | None:
    """Index of the first key that each query may see: how many padded keys are in front.

    Returns:
        int64 `(B, 1 or H, Q, 1)`, 0 for a query that sees nothing; None when there is no mask.
    """
    visible = visible_keys(attention_mask, num_keys)
    return None if visible is None else visible.to(torch.uint8).argmax(dim=-1, keepdim=True)
