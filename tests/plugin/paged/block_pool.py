"""Sequences that come, grow and go in one pool of blocks, as an engine's do."""

from dataclasses import dataclass

import numpy as np
import torch

from tests.plugin.paged.paged_rows import Rows, attend, general, integers
from tests.tolerances import ATTENTION_ATOL
from vllm_sparse_plugin.paged.attention import PagedAttention, QueryBatch
from vllm_sparse_plugin.paged.layout import BlockLayout, LayerCache


@dataclass
class Sequence:
    """Its keys and values `[n, num_kv_heads, head_size]`, and the blocks that hold them."""

    keys: torch.Tensor
    values: torch.Tensor
    blocks: list[int]


class Pool:
    """One layer's cache, its free blocks, and the sequences in it. Unwritten memory is NaN."""

    def __init__(self, layout: BlockLayout, num_blocks: int = 60, seed: int = 0) -> None:
        shape = layout.shape
        width = layout.bytes_per_token // shape.dtype.itemsize
        self.kv_cache = torch.full(
            (num_blocks, shape.num_kv_heads, shape.block_size, width), torch.nan, dtype=shape.dtype
        )
        self.cache = LayerCache.of(self.kv_cache, layout, 1)
        self.generator = torch.Generator().manual_seed(seed)
        self.free = torch.randperm(num_blocks, generator=self.generator).tolist()
        self.uses = dict.fromkeys(range(num_blocks), 0)
        self.sequences: list[Sequence] = []

    def start(self, count: int) -> Sequence:
        shape = self.cache.layout.shape
        empty = torch.empty(0, shape.num_kv_heads, shape.head_size, dtype=shape.dtype)
        self.sequences.append(Sequence(empty, empty, []))
        self.append(self.sequences[-1], count)
        return self.sequences[-1]

    def append(self, sequence: Sequence, count: int) -> None:
        shape = self.cache.layout.shape
        before = len(sequence.keys)
        size = (count, shape.num_kv_heads, shape.head_size)
        # No small integers: they lie just between two centroids so often that rounding decides.
        key = torch.randn(size, generator=self.generator).to(shape.dtype)
        value = torch.randn(size, generator=self.generator).to(shape.dtype)
        while len(sequence.blocks) * shape.block_size < before + count:
            sequence.blocks.append(self._take())
        position = torch.arange(before, before + count)
        blocks = torch.tensor(sequence.blocks)[position // shape.block_size]
        slots = blocks * shape.block_size + position % shape.block_size
        self.cache.write(key, value, torch.cat([slots, torch.tensor([-1])]))
        sequence.keys = torch.cat([sequence.keys, key])
        sequence.values = torch.cat([sequence.values, value])

    def rewrite(self, sequence: Sequence, count: int) -> None:
        """The last keys, outside of shared blocks, are rejected, and others come."""
        shape = self.cache.layout.shape
        shared = sum(self.uses[block] > 1 for block in sequence.blocks) * shape.block_size
        count = min(count, len(sequence.keys) - shared)
        kept = len(sequence.keys) - count
        sequence.keys, sequence.values = sequence.keys[:kept], sequence.values[:kept]
        self.append(sequence, count)

    def fork(self, sequence: Sequence, with_last_block: bool) -> Sequence:
        """Another sequence with the same full blocks; and with a copy of the last, if not full."""
        size = self.cache.layout.shape.block_size
        full = len(sequence.keys) // size
        count = len(sequence.keys) if with_last_block else full * size
        blocks = sequence.blocks[:full]
        for block in blocks:
            self.uses[block] += 1
        if count > full * size:
            copy = self._take()
            self.kv_cache[copy] = self.kv_cache[sequence.blocks[full]]
            blocks.append(copy)
        self.sequences.append(Sequence(sequence.keys[:count], sequence.values[:count], blocks))
        return self.sequences[-1]

    def end(self, sequence: Sequence) -> None:
        """Its blocks go back, their contents stay until others use them."""
        self.sequences = [other for other in self.sequences if other is not sequence]
        for block in sequence.blocks:
            self.uses[block] -= 1
            if self.uses[block] == 0:
                self.free.append(block)

    def rows(self, queries: list[tuple[Sequence, int]]) -> Rows:
        """A batch of queries, each with the number of keys that it sees."""
        shape = self.cache.layout.shape
        table = np.full((len(queries), max(len(s.blocks) for s, _ in queries) + 1), 10**6, np.int32)
        for row, (sequence, _) in enumerate(queries):
            table[row, : len(sequence.blocks)] = sequence.blocks
        lengths = np.array([length for _, length in queries], np.int32)
        query = integers(
            len(queries), shape.num_heads, shape.head_size, generator=self.generator
        ).to(shape.dtype)
        return Rows(
            self.cache,
            self.kv_cache,
            QueryBatch(table, np.arange(len(queries), dtype=np.int32), lengths),
            query,
            [sequence.keys.transpose(0, 1)[None] for sequence, _ in queries],
            [sequence.values.transpose(0, 1)[None] for sequence, _ in queries],
        )

    def check(
        self, attention: PagedAttention, maskers: list[dict], queries: list[tuple[Sequence, int]]
    ) -> torch.Tensor:
        """The outputs, which are those of the general path."""
        rows = self.rows(queries)
        output, read = attend(attention, rows)
        expected, counts = general(maskers, rows)
        assert read.keys.tolist() == counts
        assert (output - expected).abs().max() <= ATTENTION_ATOL[rows.query.dtype]
        return output

    def _take(self) -> int:
        block = self.free.pop()
        self.uses[block] += 1
        return block
