"""The channel file of Double Sparsity.

JSON: `{"model.layers.0.self_attn.qk_proj": [[channel, ...], ...], ...}`: per layer and projection a
list of heads, each with its channels from the most to the least important.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

ChannelData = dict[str, list[list[int]]]
PROJECTIONS = ("qk_proj", "q_proj", "k_proj")


def channel_key(layer_idx: int, projection: str) -> str:
    """The entry's name in the file."""
    return f"model.layers.{layer_idx}.self_attn.{projection}"


def load_sorted_channels_from_file(path: str | Path) -> ChannelData:
    """Reads and checks a channel file.

    Raises:
        ValueError: There is no such file, or it is not of the form above.
    """
    try:
        data = json.loads(Path(path).read_text())
    except OSError as error:
        raise ValueError(f"the channel file {str(path)!r} cannot be read: {error}") from error
    except ValueError as error:
        raise ValueError(f"the channel file {str(path)!r} is not JSON: {error}") from error
    return validate_channel_data(data)


def validate_channel_data(data: object) -> ChannelData:
    """Checks the form of channel data.

    Raises:
        ValueError: Says which entry is wrong, and how.
    """
    if not isinstance(data, dict):
        raise ValueError(f"channel data must be an object, got {type(data).__name__}")
    for name, heads in data.items():
        if not isinstance(heads, list) or not heads:
            raise ValueError(f"{name} must be a list of one list per head, got {heads!r}")
        for head in heads:
            if not isinstance(head, list) or not head or not all(type(c) is int for c in head):
                raise ValueError(f"{name} must hold lists of integers, got {head!r}")
            if sorted(head) != list(range(len(head))):
                raise ValueError(f"{name} must hold each channel once per head, got {head!r}")
        if len({len(head) for head in heads}) > 1:
            raise ValueError(f"{name} must have equally many channels for every head")
    return data


def extract_layer_channels(
    data: ChannelData, layer_idx: int, projection: str, device: torch.device
) -> torch.Tensor:
    """One layer's channel orders.

    Returns:
        int64 `(heads, channels)`.

    Raises:
        ValueError: The data has nothing for the layer; another layer's channels would be wrong.
    """
    name = channel_key(layer_idx, projection)
    if name not in data:
        raise ValueError(f"the channel data has no entry {name!r}")
    return torch.tensor(data[name], dtype=torch.int64, device=device)
