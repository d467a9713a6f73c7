"""Where a model goes, and what it is loaded with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


def resolve_device(device: str | int | torch.device | None) -> torch.device:
    """The device that a user means.

    Args:
        device: None = CPU; an int = CUDA index; a name; a `torch.device`.

    Raises:
        ValueError: There is no such device, or it is no index at all (True, -1).
    """
    if device is None:
        return torch.device("cpu")
    if isinstance(device, bool) or (isinstance(device, int) and device < 0):
        raise ValueError(f"device must be None, an index, a name or a torch.device, got {device}")
    try:
        resolved = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"device {device!r}: {error}") from error
    if resolved.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (resolved.index or 0) >= count:
            raise ValueError(f"device {device!r}: this machine has {count} CUDA devices")
    elif resolved.type != "cpu":
        try:
            torch.empty(0, device=resolved)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            raise ValueError(f"device {device!r}: this machine has none") from error
    return resolved


def device_name(device: str | int | torch.device | None) -> str:
    """One name for each device, whether it is there or not; "cuda" is the current CUDA device."""
    if device is None:
        return "cpu"
    name = f"cuda:{device}" if isinstance(device, int) else str(device)
    if name == "cuda" and torch.cuda.is_available():
        return f"cuda:{torch.cuda.current_device()}"
    return name


def default_device() -> str:
    """Returns "cuda" where there is one, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def loader_arguments(model_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `from_pretrained`, with the weights' type under its present name.

    Args:
        model_kwargs: With `dtype`, or `torch_dtype` as older code has it, or neither.

    Raises:
        ValueError: Both, and they differ.
    """
    arguments = dict(model_kwargs)
    if "torch_dtype" in arguments:
        older = arguments.pop("torch_dtype")
        if arguments.setdefault("dtype", older) != older:
            raise ValueError(
                f"model_kwargs has torch_dtype={older} and dtype={arguments['dtype']}; give one"
            )
    return arguments
