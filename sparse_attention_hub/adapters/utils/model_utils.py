"""Where a model goes."""

from __future__ import annotations

import torch


def resolve_device(device: str | int | torch.device | None) -> torch.device:
    """The device that a user means.

    Args:
        device: None = CPU; an int = CUDA index; a name; a `torch.device`.

    Raises:
        ValueError: It is a CUDA device and there is no such one.
    """
    if device is None:
        return torch.device("cpu")
    resolved = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    if resolved.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (resolved.index or 0) >= count:
            raise ValueError(f"device {device!r}: this machine has {count} CUDA devices")
    return resolved


def default_device() -> str:
    """Returns "cuda" where there is one, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"
