"""The index of Quest: the smallest and largest element of each page's keys, per channel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from vllm_sparse_plugin.paged.kernels.page_bounds import update_pages
from vllm_sparse_plugin.paged.layout import BlockIndex, BlockShape, LayerCache

STORED_BITS = (2, 4, 8, 16)
"""Widths of a stored element; 16 = as the keys are."""


@dataclass(frozen=True)
class PageBounds(BlockIndex):
    """Bounds of all pages that are whole: of others, maskers make them from the keys.

    Attributes:
        page_size: Tokens of a page.
        label_bits: Of a stored element, one of `STORED_BITS`.
    """

    is_of_keys_alone: ClassVar[bool] = True

    page_size: int
    label_bits: int

    def reason_against(self, shape: BlockShape) -> str | None:
        """Why blocks of this shape cannot hold it; None when they can."""
        if self.label_bits not in STORED_BITS:
            return f"label_bits {self.label_bits} is none of {STORED_BITS}"
        if shape.block_size % self.page_size:
            return f"page_size {self.page_size} does not divide the block size {shape.block_size}"
        if shape.head_size * self.label_bits % 8:
            return f"{shape.head_size} channels of {self.label_bits} bits are no whole bytes"
        return None

    def record_bytes(self, shape: BlockShape) -> int:
        """Bytes of one page's record, a multiple of 4; see `kernels.page_bounds`."""
        if self.label_bits == 16:
            size = 2 * shape.head_size * shape.dtype.itemsize
        else:
            size = 16 + 2 * (shape.head_size * self.label_bits // 8)
        return -(-size // 4) * 4

    def bytes_per_block(self, shape: BlockShape) -> int:
        """See `BlockIndex.bytes_per_block`."""
        return shape.block_size // self.page_size * self.record_bytes(shape)

    def update(self, cache: LayerCache, slots: np.ndarray) -> None:
        """See `BlockIndex.update`."""
        shape = cache.layout.shape
        update_pages(
            cache.elements,
            shape.kind,
            cache.records,
            cache.layout.place_of(self),
            self.record_bytes(shape),
            shape.head_size,
            shape.block_size,
            self.page_size,
            self.label_bits,
            slots,
        )


def stored_bounds(index: PageBounds, cache: LayerCache) -> tuple[torch.Tensor, torch.Tensor]:
    """What is stored, decoded in plain steps (for tests and for whoever looks into a cache).

    Of pages that are not whole, it may be anything.

    Returns:
        Lows and highs, each `[num_blocks, num_kv_heads, pages of a block, head_size]`, float32.
    """
    shape = cache.layout.shape
    pages = shape.block_size // index.page_size
    records = cache.stored(index)
    records = records.reshape(*records.shape[:2], pages, -1).contiguous()
    if index.label_bits == 16:
        rows = records.view(shape.dtype)[..., : 2 * shape.head_size].float()
        return rows[..., : shape.head_size], rows[..., shape.head_size :]
    scales = records[..., :16].contiguous().view(torch.float32)
    width = shape.head_size * index.label_bits // 8
    sides = []
    for side in range(2):
        packed = records[..., 16 + side * width : 16 + (side + 1) * width].int()
        mask = (1 << index.label_bits) - 1
        parts = [
            (packed >> (part * index.label_bits)) & mask for part in range(8 // index.label_bits)
        ]
        codes = torch.cat(parts, dim=-1).float()
        low, step = scales[..., 2 * side, None], scales[..., 2 * side + 1, None]
        sides.append(codes * step + low)
    return sides[0], sides[1]
