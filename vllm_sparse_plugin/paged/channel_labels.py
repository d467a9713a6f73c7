"""The index of Double Sparsity: the channels of each key that matter most, in few bits."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch

from sparse_attention_hub.sparse_attention.research_attention.maskers.fixed.implementations.utils.double_sparsity_utils import (  # noqa: E501
    ChannelData,
    extract_layer_channels,
    load_sorted_channels_from_file,
)
from vllm_sparse_plugin.paged.kernels.channel_labels import write_labels
from vllm_sparse_plugin.paged.layout import BlockIndex, BlockShape, LayerCache

STORED_BITS = (2, 4, 8, 16)
"""Widths of a stored channel; 16 = as the keys are."""


@dataclass(frozen=True)
class ChannelLabels(BlockIndex):
    """Labels of all keys, by the channel file.

    Attributes:
        channel_file: See `double_sparsity_utils`.
        channel_selection: Whose channels of the file.
        group_factor: One channel in this many is kept.
        label_bits: Of a stored channel, one of `STORED_BITS`.
    """

    channel_file: str
    channel_selection: str
    group_factor: int
    label_bits: int

    def reason_against(self, shape: BlockShape) -> str | None:
        """Why blocks of this shape cannot hold it; None when they can."""
        if self.label_bits not in STORED_BITS:
            return f"label_bits {self.label_bits} is none of {STORED_BITS}"
        if shape.head_size < self.group_factor:
            return f"group_factor {self.group_factor} is more than the head size {shape.head_size}"
        sizes = _sizes(self.channel_file, self.channel_selection)
        if len(sizes) != 1:
            return f"the channel file's layers differ in heads or channels: {sorted(sizes)}"
        [(rows, channels)] = sizes
        if rows not in (shape.num_heads, shape.num_kv_heads) or channels != shape.head_size:
            return (
                f"the channel file has {rows} heads of {channels} channels, the layers have "
                f"{shape.num_heads} or {shape.num_kv_heads} of {shape.head_size}"
            )
        return None

    def num_channels(self, shape: BlockShape) -> int:
        """Kept channels, C."""
        return shape.head_size // self.group_factor

    def rows_per_head(self, shape: BlockShape) -> int:
        """Labels of each key: one, or one per query head that reads it."""
        [(rows, _)] = _sizes(self.channel_file, self.channel_selection)
        return rows // shape.num_kv_heads

    def channels(self, layer_index: int, shape: BlockShape) -> np.ndarray:
        """The kept channels of a layer, `[rows, C]`, int32.

        Raises:
            ValueError: The file has nothing for the layer.
        """
        return _channels(
            self.channel_file, self.channel_selection, layer_index, self.num_channels(shape)
        )

    def row_bytes(self, shape: BlockShape) -> int:
        """Bytes of one row of labels of a block, a multiple of 4; see `kernels.channel_labels`."""
        if self.label_bits == 16:
            size = shape.block_size * self.num_channels(shape) * shape.dtype.itemsize
        else:
            codes = -(-self.num_channels(shape) * self.label_bits // 8)
            size = shape.block_size * (2 * shape.dtype.itemsize + codes)
        return -(-size // 4) * 4

    def bytes_per_block(self, shape: BlockShape) -> int:
        """See `BlockIndex.bytes_per_block`."""
        return self.rows_per_head(shape) * self.row_bytes(shape)

    def update(self, cache: LayerCache, slots: np.ndarray) -> None:
        """See `BlockIndex.update`."""
        shape = cache.layout.shape
        try:
            channels = self.channels(cache.layer_index, shape)
        except ValueError:
            return  # No masker can ask for labels of a layer that the file leaves out.
        write_labels(
            cache.elements,
            shape.kind,
            cache.records,
            cache.layout.place_of(self),
            self.row_bytes(shape),
            self.label_bits,
            channels,
            shape.head_size,
            shape.block_size,
            slots,
        )


@functools.lru_cache(maxsize=8)
def _file(path: str) -> ChannelData:
    return load_sorted_channels_from_file(path)


@functools.lru_cache(maxsize=8)
def _sizes(path: str, selection: str) -> frozenset[tuple[int, int]]:
    """Heads and channels of a file's layers."""
    return frozenset(
        (len(heads), len(heads[0]))
        for name, heads in _file(path).items()
        if name.endswith(f".{selection}")
    )


@functools.lru_cache(maxsize=4096)
def _channels(path: str, selection: str, layer_index: int, count: int) -> np.ndarray:
    channels = extract_layer_channels(_file(path), layer_index, selection, torch.device("cpu"))
    return np.ascontiguousarray(channels[:, :count].numpy().astype(np.int32))


def stored_labels(index: ChannelLabels, cache: LayerCache) -> torch.Tensor:
    """What is stored, decoded in plain steps (for tests and for whoever looks into a cache).

    Returns:
        `[num_blocks, num_kv_heads, rows per head, block_size, C]`, float32.
    """
    shape = cache.layout.shape
    rows, count = index.rows_per_head(shape), index.num_channels(shape)
    records = cache.stored(index)
    records = records.reshape(*records.shape[:2], rows, index.row_bytes(shape)).contiguous()
    front, size = records.shape[:3], shape.block_size
    if index.label_bits == 16:
        values = records.view(shape.dtype)[..., : count * size].float()
        return values.reshape(*front, count, size).transpose(-1, -2)
    width, begin = -(-count * index.label_bits // 8), 2 * shape.dtype.itemsize * size
    extremes = records[..., :begin].contiguous().view(shape.dtype).float()
    low, high = extremes.reshape(*front, 2, 1, size).unbind(-3)
    packed = records[..., begin : begin + width * size].int().reshape(*front, width, size)
    mask = (1 << index.label_bits) - 1
    parts = [(packed >> (part * index.label_bits)) & mask for part in range(8 // index.label_bits)]
    codes = torch.cat(parts, dim=-2)[..., :count, :].float()
    return (codes * ((high - low) / mask) + low).transpose(-1, -2)
