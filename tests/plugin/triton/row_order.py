"""The same cache in the order of CPUs (keys, then values) and of devices (`key | value` rows)."""

import torch

from tests.plugin.triton.interpreter import DEVICE
from vllm_sparse_plugin.paged.layout import BlockShape


def for_device(kv_cache: torch.Tensor, shape: BlockShape) -> torch.Tensor:
    """A CPU's cache, copied to the device in its order."""
    return _reordered(kv_cache, shape, (2, shape.block_size)).to(DEVICE)


def from_device(kv_cache: torch.Tensor, shape: BlockShape) -> torch.Tensor:
    """The inverse of `for_device`."""
    return _reordered(kv_cache.cpu(), shape, (shape.block_size, 2))


def _reordered(kv_cache: torch.Tensor, shape: BlockShape, axes: tuple[int, int]) -> torch.Tensor:
    result = kv_cache.clone()
    size = 2 * shape.num_kv_heads * shape.block_size * shape.head_size
    rows = kv_cache.view(len(kv_cache), -1)[:, :size]
    split = rows.reshape(len(rows), shape.num_kv_heads, *axes, shape.head_size)
    result.view(len(kv_cache), -1)[:, :size] = split.transpose(2, 3).reshape(len(rows), -1)
    return result
