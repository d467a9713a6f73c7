"""What a block holds: keys, values, and the indices of the configured maskers.

A block has, of one KV head after the other, a row of key per token and then a row of value per
token (on CUDA a row `key | value` per token, see `triton_kernels`); and behind them each index, of
one KV head after the other: a scan of an index reads the memory of a block in order. An index is
written where the keys are written. So it is shared by the prefix cache, freed, swapped and copied
with its block, and can never be of another block's keys.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
import torch

from vllm_sparse_plugin.paged.cache_scales import UNSCALED, CacheScales
from vllm_sparse_plugin.paged.kernels.rows import BFLOAT16, E4M3, FLOAT16, FLOAT32
from vllm_sparse_plugin.paged.kernels.writing import write_rows

_KINDS = {
    torch.float32: FLOAT32,
    torch.bfloat16: BFLOAT16,
    torch.float16: FLOAT16,
    torch.float8_e4m3fn: E4M3,
}
_ARRAYS = {4: torch.float32, 2: torch.uint16, 1: torch.uint8}
"""What kernels take elements of so many bytes for."""
_ALIGNMENT_BYTES = 16
"""Of each index of a KV head: what GPUs load at once. Not more: what lies between the indices of
heads is loaded with them, since memory comes in larger pieces (48 of 192 bytes in Quest's case)."""


@dataclass(frozen=True)
class BlockShape:
    """Of a layer's cache.

    Attributes:
        block_size: Tokens of a block.
        num_heads: Query heads.
        num_kv_heads: KV heads.
        head_size: Channels of a key, and of a value.
        dtype: Of the cache: float32, bfloat16, float16 or float8_e4m3fn.
    """

    block_size: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    dtype: torch.dtype

    @property
    def kind(self) -> int:
        """Of the elements, see `kernels.rows`."""
        return _KINDS[self.dtype]

    @property
    def key_value_bytes(self) -> int:
        """Bytes of one token's key and value, per KV head."""
        return 2 * self.head_size * self.dtype.itemsize


class BlockIndex(ABC):
    """Something small about the keys of a block, kept with them.

    Implementations are frozen dataclasses: maskers that need the same index share it.

    Attributes:
        is_of_keys_alone: Whether it depends on the keys alone, not on the layer they were written
            by: then it serves other layers that read the same cache.
    """

    is_of_keys_alone: ClassVar[bool] = False

    @abstractmethod
    def bytes_per_block(self, shape: BlockShape) -> int:
        """Bytes per block and KV head."""

    @abstractmethod
    def update(self, cache: LayerCache, slots: np.ndarray) -> None:
        """Makes the index right again after keys were written.

        Args:
            cache: With the new keys.
            slots: `[num_tokens]`, int64, where they are; negative = padding.
        """


@dataclass(frozen=True)
class BlockLayout:
    """Where everything is in a block.

    Attributes:
        shape: Of the cache.
        indices: In the order in which they lie there.
    """

    shape: BlockShape
    indices: tuple[BlockIndex, ...] = ()

    @cached_property
    def _places(self) -> dict[BlockIndex, tuple[int, int]]:
        heads = self.shape.num_kv_heads
        offset = heads * self.shape.block_size * self.shape.key_value_bytes
        places = {}
        for index in self.indices:
            stride = _aligned(index.bytes_per_block(self.shape))
            places[index] = (offset, stride)
            offset += heads * stride
        return places

    def place_of(self, index: BlockIndex, begin: int = 0) -> tuple[int, int]:
        """Where an index is in a block, see `kernels`.

        Args:
            index: One of `indices`.
            begin: Bytes of the index to leave out at its start.
        """
        offset, stride = self._places[index]
        return offset + begin, stride

    @property
    def index_bytes_per_token(self) -> int:
        """Bytes of all indices per token and KV head, as vLLM accounts for them."""
        total = sum(_aligned(index.bytes_per_block(self.shape)) for index in self.indices)
        per_token = -(-total // self.shape.block_size)
        # Whole float32s per token keep every block and head aligned.
        return -(-per_token // 4) * 4

    @property
    def bytes_per_token(self) -> int:
        """Bytes per token and KV head that a cache has at least."""
        return self.shape.key_value_bytes + self.index_bytes_per_token


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES


@dataclass(frozen=True)
class LayerCache:
    """One layer's cache, as kernels see it: views of one memory.

    Attributes:
        layout: Of the blocks.
        layer_index: Of the attention layer.
        elements: `[num_blocks, num_kv_heads, width]`, float32, uint16 or uint8; see `kernels`.
        records: The same as uint8.
        scales: Of the elements.
    """

    layout: BlockLayout
    layer_index: int
    elements: np.ndarray
    records: np.ndarray
    scales: CacheScales = UNSCALED

    @classmethod
    def of(
        cls,
        kv_cache: torch.Tensor,
        layout: BlockLayout,
        layer_index: int,
        scales: CacheScales = UNSCALED,
    ) -> LayerCache:
        """Views of vLLM's tensor.

        Args:
            kv_cache: `[num_blocks, num_kv_heads, block_size, width]`, contiguous, with room for all
                of the layout.
            layout: Of its blocks.
            layer_index: Of the attention layer.
            scales: Of its elements.

        Raises:
            ValueError: It has not.
        """
        require_room(kv_cache, layout)
        flat = kv_cache.view(*kv_cache.shape[:2], -1)
        records = flat.view(torch.uint8).numpy()
        return cls(layout, layer_index, as_elements(flat), records, scales)

    def stored(self, index: BlockIndex) -> torch.Tensor:
        """An index as bytes, `[num_blocks, num_kv_heads, bytes]`: a view.

        Args:
            index: Of the layout.
        """
        shape = self.layout.shape
        offset, stride = self.layout.place_of(index)
        block_bytes = self.records[0].size
        return torch.from_numpy(self.records).as_strided(
            (len(self.records), shape.num_kv_heads, index.bytes_per_block(shape)),
            (block_bytes, stride, 1),
            offset,
        )

    def write(self, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor) -> None:
        """Writes keys and values, and brings every index up to date.

        Args:
            key: `[num_tokens, num_kv_heads, head_size]`; `value` likewise.
            value: See `key`.
            slots: `[num_tokens]`, int64; negative = padding.
        """
        places, dtype = slots[: key.shape[0]].numpy(), self.layout.shape.dtype
        write_rows(
            as_elements(stored_as(key, dtype, self.scales.key).contiguous()),
            as_elements(stored_as(value, dtype, self.scales.value).contiguous()),
            self.elements,
            self.layout.shape.block_size,
            places,
        )
        for index in self.layout.indices:
            index.update(self, places)


def require_room(kv_cache: torch.Tensor, layout: BlockLayout) -> None:
    """Looks whether a cache can have a layout.

    Args:
        kv_cache: See `LayerCache.of`.
        layout: Of its blocks.

    Raises:
        ValueError: It cannot.
    """
    shape = layout.shape
    heads, width = shape.num_kv_heads, layout.bytes_per_token // shape.dtype.itemsize
    if (
        kv_cache.dtype != shape.dtype
        or kv_cache.shape[1:3] != (heads, shape.block_size)
        or kv_cache.shape[3] < width
        or not kv_cache.is_contiguous()
    ):
        raise ValueError(
            f"the KV cache must be contiguous [*, {heads}, {shape.block_size}, >= {width}] of "
            f"{shape.dtype}, got {tuple(kv_cache.shape)} of {kv_cache.dtype} with strides "
            f"{kv_cache.stride()}"
        )


def as_elements(tensor: torch.Tensor) -> np.ndarray:
    """A tensor's memory as float32, or as integers where its type has less bits; see `kernels`."""
    elements: np.ndarray = tensor.view(_ARRAYS[tensor.dtype.itemsize]).numpy()
    return elements


def stored_as(rows: torch.Tensor, dtype: torch.dtype, scale: float) -> torch.Tensor:
    """Keys or values as a cache holds them; of 8 bits, the nearest numbers that it can hold.

    Args:
        rows: Of any shape and floating type.
        dtype: Of the cache; with more than 8 bits, the rows' own.
        scale: What they are divided by, where the cache has 8 bits.
    """
    if dtype.itemsize > 1:
        return rows
    largest = torch.finfo(dtype).max  # what is beyond it may become NaN, see PyTorch's versions
    return (rows.float() / scale).clamp(-largest, largest).to(dtype)


def gathered(rows: torch.Tensor, *places: slice | torch.Tensor) -> torch.Tensor:
    """`rows[places]`, of any type: torch gathers bytes on every device, but not E4M3.

    Args:
        rows: Of a cache.
        places: As in an index expression.
    """
    if rows.dtype.itemsize > 1:
        return rows[places]
    return rows.view(torch.uint8)[places].view(rows.dtype)


def read_into(target: torch.Tensor, rows: torch.Tensor, scale: float) -> torch.Tensor:
    """What `stored_as` has stored, in a model's type.

    Args:
        target: Of the model's type; written.
        rows: Of a cache of 8 bits; of as many axes.
        scale: See `stored_as`.

    Returns:
        The target.
    """
    target.copy_(rows)
    return target if scale == 1 else target.mul_(scale)
