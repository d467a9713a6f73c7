"""Sequences in scattered blocks, random, for benchmarks: filled as a server fills them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from vllm_sparse_plugin.paged.layout import BlockLayout, BlockShape
from vllm_sparse_plugin.paged.triton_kernels.cache_rows import DeviceBatch

WRITTEN_AT_ONCE = 1 << 15
"""Tokens that are written in one go."""
Write = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], object]
"""Takes keys, values, and where they go."""


@dataclass(frozen=True)
class Sequences:
    """Sequences of one length, in blocks in any order.

    Attributes:
        batch: Block table, rows and lengths, one query per sequence.
        keys: Of each.
        block_size: Tokens of a block.
    """

    batch: DeviceBatch
    keys: int
    block_size: int

    @classmethod
    def of(cls, count: int, keys: int, block_size: int, device: torch.device | str) -> Sequences:
        """Gives each sequence blocks of its own.

        Args:
            count: Sequences.
            keys: Of each.
            block_size: Tokens of a block.
            device: Of the tensors.
        """
        blocks = -(-keys // block_size)
        order = torch.randperm(count * blocks, generator=torch.Generator().manual_seed(0))
        table = order.to(torch.int32).view(count, blocks).to(device)
        rows = torch.arange(count, dtype=torch.int32, device=device)
        return cls(DeviceBatch(table, rows, torch.full_like(rows, keys)), keys, block_size)

    @property
    def count(self) -> int:
        """Sequences."""
        return len(self.batch.rows)

    @property
    def num_blocks(self) -> int:
        """Of all of them."""
        return self.batch.block_table.numel()

    def slots(self, sequence: int, begin: int, end: int) -> torch.Tensor:
        """Where some tokens of a sequence are, int64.

        Args:
            sequence: Which.
            begin: First token.
            end: Behind the last one.
        """
        table = self.batch.block_table[sequence].long()
        places = torch.arange(begin, end, device=table.device)
        return table[places // self.block_size] * self.block_size + places % self.block_size

    @property
    def last_slots(self) -> torch.Tensor:
        """Where each sequence's last token is: what a decode step writes."""
        return torch.cat(
            [self.slots(row, self.keys - 1, self.keys) for row in range(self.count)]
        ).contiguous()


def random_heads(
    count: int, heads: int, shape: BlockShape, generator: torch.Generator
) -> torch.Tensor:
    """`[count, heads, head_size]` of the cache's type, on the generator's device."""
    return torch.randn(
        count, heads, shape.head_size, generator=generator, device=generator.device
    ).to(shape.dtype)


def empty_cache(layout: BlockLayout, sequences: Sequences) -> torch.Tensor:
    """A layer's cache for all of the sequences' blocks, of zeros.

    Args:
        layout: Of the blocks.
        sequences: What it will hold.
    """
    shape = layout.shape
    width = layout.bytes_per_token // shape.dtype.itemsize
    return torch.zeros(
        (sequences.num_blocks, shape.num_kv_heads, shape.block_size, width),
        dtype=shape.dtype,
        device=sequences.batch.rows.device,
    )


def fill(write: Write, shape: BlockShape, sequences: Sequences, seed: int) -> None:
    """Writes random keys and values.

    Args:
        write: Of some tokens, into a cache.
        shape: Of the cache.
        sequences: What it holds.
        seed: Of the numbers.
    """
    generator = torch.Generator(sequences.batch.rows.device).manual_seed(seed)
    for sequence in range(sequences.count):
        for begin in range(0, sequences.keys, WRITTEN_AT_ONCE):
            slots = sequences.slots(sequence, begin, min(begin + WRITTEN_AT_ONCE, sequences.keys))
            key, value = (
                random_heads(len(slots), shape.num_kv_heads, shape, generator) for _ in range(2)
            )
            write(key, value, slots)
