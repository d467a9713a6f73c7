"""Indices of codes that are made with something learned from the sequence's first keys.

A codebook, or a mean, is learned from a sequence's first 2**g keys, and anew when the sequence has
twice as many (see `key_prefix`). So a key's code depends on the key *and* on the sequence, and the
prefix cache may give one block to sequences that want different codes. This is how it works on CPUs
(`device.sequences` and `device.indices.learned` say what is different on CUDA):

- *Codes say what they are of.* A block's header has the tag of the learned state that its codes
  are of, and how many of its tokens have codes. Writing a key takes back its code and those behind
  it. A query's codes are looked for before it is scored: blocks with another tag, or with too few
  codes, get them from their keys. A decode step finds all codes but its own token's.
- *Learned states are named by the keys.* The header also has stamps: numbers that name the first
  16, 32, ... keys of the block. Writing a key at place p draws a new number, never used before, for
  every stamp that names a key at p. So the stamps of the blocks that cover a prefix are the name of
  its content: equal stamps are equal keys, however blocks are freed and used again, rewritten from
  the middle (a preempted or rejected token computed anew), or copied, wholly or half written, and
  written on. And a stamp stays while keys are appended behind what it names: the state of a prefix
  is learned once. A tag is a digest of that name, the layer and the masker's parameters.
- *Nothing is kept by request.* The states themselves lie in a bounded memo, `LearnedStates`, by
  their names. What it forgets is learned again from the same keys, with the reference's own
  functions, and has the same tag: a lost state costs time, and nothing else.

What it costs: when a sequence doubles, its state is learned and all of its codes are made anew.
Two sequences that share blocks while they want different states (one has doubled and the other has
not) take turns: each makes the shared blocks' codes anew, in every step, which reads all of their
keys. It ends when the other one has doubled too. The state of a prefix that does not end with a
block of an unusual size (not a power of two) is learned anew while its last block fills.
"""

from __future__ import annotations

import functools
import hashlib
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vllm_sparse_plugin.paged.kernels.hash_signatures import read_keys
from vllm_sparse_plugin.paged.kernels.learned_blocks import (
    COUNT,
    TAG,
    list_short_blocks,
    name_prefixes,
    note_writes,
)
from vllm_sparse_plugin.paged.kernels.learned_blocks import STAMPS as FIRST_STAMP
from vllm_sparse_plugin.paged.layout import BlockIndex, BlockShape, LayerCache
from vllm_sparse_plugin.paged.learned_states import LearnedStates
from vllm_sparse_plugin.paged.scratch import scratch
from vllm_sparse_plugin.paged.stamps import STAMPS

_SMALLEST_NAMED = 16
"""Keys: states of shorter prefixes are learned in no time."""
_ALIGNMENT_BYTES = 64
"""Of the codes behind the header, from the start of the index: so headers have room to grow with
the block size, and codes are at the same place for most of them."""


@dataclass(frozen=True)
class ShortBlocks:
    """Blocks that lack codes.

    Attributes:
        blocks: `[n]`, int64, each once.
        wanted: `[n]`, int64: tokens that need codes.
        tags: `[n]`, int64: of the state that the codes shall be of.
        places: `[n]`, int64: where the state is in `LearnedStates.values`.
    """

    blocks: np.ndarray
    wanted: np.ndarray
    tags: np.ndarray
    places: np.ndarray


@dataclass(frozen=True)
class Turn:
    """Queries whose codes are in the blocks, until the next turn.

    Attributes:
        queries: `[n]`, int64: which of the step's queries.
        places: `[num_queries]`, int64: where the state of each of them is; others have -1.
        states: `[places, width]`, float32.
    """

    queries: np.ndarray
    places: np.ndarray
    states: np.ndarray


class LearnedIndex(BlockIndex):
    """Base of such indices: a header, and then codes of the implementation's own.

    Implementations are frozen dataclasses, whose fields are all that their codes depend on besides
    the keys and the layer.
    """

    @abstractmethod
    def code_bytes(self, shape: BlockShape) -> int:
        """Bytes of the codes of a block and KV head."""

    @abstractmethod
    def state_width(self, shape: BlockShape) -> int:
        """float32s of a learned state."""

    @abstractmethod
    def learn(self, keys: torch.Tensor) -> np.ndarray:
        """The state that is learned from keys.

        Args:
            keys: `(1, num_kv_heads, 2**g, head_size)`, float32; no keys where nothing is learned.

        Returns:
            `state_width` float32s, of any shape.
        """

    @abstractmethod
    def encode(self, cache: LayerCache, short: ShortBlocks, states: np.ndarray) -> None:
        """Makes the codes that blocks lack, for all KV heads, and sets tags and counts.

        Args:
            cache: Of the layer.
            short: The blocks.
            states: `[places, width]`, float32.
        """

    def prefix_sizes(self, lengths: np.ndarray) -> np.ndarray:
        """From how many keys the state of each query is learned, see `key_prefix.prefix_sizes`.

        Args:
            lengths: `[num_queries]`, int32: keys that a query sees.

        Returns:
            `[num_queries]`, int64.
        """
        _, exponents = np.frexp(lengths.astype(np.float64))
        return np.int64(1) << (exponents.astype(np.int64) - 1)

    def bytes_per_block(self, shape: BlockShape) -> int:
        """See `BlockIndex.bytes_per_block`."""
        return self.codes_at(shape) + self.code_bytes(shape)

    def codes_at(self, shape: BlockShape) -> int:
        """Bytes from the start of the index to the codes."""
        header = 8 * self.header_words(shape)
        return -(-header // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES

    def header_words(self, shape: BlockShape) -> int:
        """int64s of the header."""
        return FIRST_STAMP + len(_named_sizes(shape.block_size))

    def states(self, shape: BlockShape) -> LearnedStates:
        """The memo of this index, of all layers of such a shape."""
        return _states(self, shape)

    def update(self, cache: LayerCache, slots: np.ndarray) -> None:
        """See `BlockIndex.update`."""
        shape = cache.layout.shape
        note_writes(
            cache.records,
            cache.layout.place_of(self),
            shape.block_size,
            _named_sizes(shape.block_size),
            STAMPS.draw(len(slots)),
            slots,
        )

    def turns(
        self, cache: LayerCache, block_table: np.ndarray, rows: np.ndarray, lengths: np.ndarray
    ) -> Iterator[Turn]:
        """Makes the codes that queries need, in as many turns as it takes.

        One turn, unless queries share blocks and want different codes of them: other sequences, or
        one sequence's queries in a chunk within which it doubles.

        Args:
            cache: Of the layer.
            block_table: `[num_rows, max_blocks]`, int32.
            rows: `[num_queries]`, int32: whose blocks a query reads.
            lengths: `[num_queries]`, int32: keys that a query sees.

        Yields:
            Each query in one turn.
        """
        # A group is what has the same blocks and the same state; in the order of their sizes.
        keys, group_of = np.unique(
            self.prefix_sizes(lengths) << 32 | rows.astype(np.int64), return_inverse=True
        )
        prefixes, owners = keys >> 32, (keys & 0xFFFFFFFF).astype(np.int32)
        needed = np.zeros(len(keys), np.int64)
        np.maximum.at(needed, group_of, lengths)
        names = self._names(cache, block_table, owners, prefixes)
        tags = np.array([int.from_bytes(name[:8], "little", signed=True) for name in names])
        known = self.states(cache.layout.shape)
        places = np.full(len(lengths), -1, np.int64)
        first = 0
        while first < len(keys):
            end, short = self._short_blocks(
                cache, block_table, owners, needed, tags, first, first + len(known.values)
            )
            found = np.full(len(keys), -1, np.int64)
            for group in range(first, end):
                blocks, size = block_table[owners[group]], int(prefixes[group])
                learn = functools.partial(self._learn_again, cache, blocks, size)
                found[group] = known.place_of(names[group], learn)
            listed, wanted, groups = short
            found_short = ShortBlocks(listed, wanted, tags[groups], found[groups])
            self.encode(cache, found_short, known.values)
            queries = np.flatnonzero((first <= group_of) & (group_of < end))
            places[:] = -1
            places[queries] = found[group_of[queries]]
            yield Turn(queries, places, known.values)
            first = end

    def _learn_again(self, cache: LayerCache, blocks: np.ndarray, count: int) -> np.ndarray:
        """The state of a sequence's first `count` keys."""
        shape = cache.layout.shape
        places = np.arange(count)
        slots = blocks[places // shape.block_size].astype(np.int64) * shape.block_size
        slots += places % shape.block_size
        keys = np.empty((shape.num_kv_heads, count, shape.head_size), np.float32)
        read_keys(cache.elements, shape.kind, shape.block_size, slots, keys)
        return self.learn(torch.from_numpy(keys)[None])

    def _names(
        self, cache: LayerCache, block_table: np.ndarray, rows: np.ndarray, prefixes: np.ndarray
    ) -> list[bytes]:
        """The name of each group's state."""
        shape = cache.layout.shape
        counts = -(-prefixes // shape.block_size)
        stamps = np.empty((len(rows), int(counts.max())), np.int64)
        name_prefixes(
            cache.records,
            cache.layout.place_of(self),
            shape.block_size,
            _named_sizes(shape.block_size),
            block_table,
            rows,
            prefixes,
            stamps,
        )
        names = []
        for row, count, prefix in zip(stamps, counts.tolist(), prefixes.tolist(), strict=True):
            digest = _digest_of(self, shape, cache.layer_index).copy()
            digest.update(prefix.to_bytes(8, "little"))
            digest.update(row[:count].tobytes())
            names.append(digest.digest())
        return names

    def _short_blocks(
        self,
        cache: LayerCache,
        block_table: np.ndarray,
        rows: np.ndarray,
        lengths: np.ndarray,
        tags: np.ndarray,
        first: int,
        end: int,
    ) -> tuple[int, tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """The group after the last one of a turn; blocks, wanted tokens and groups."""
        shape = cache.layout.shape
        total = int((-(-lengths[first:] // shape.block_size)).sum())
        blocks, wanted, groups = (np.empty(total, np.int64) for _ in range(3))
        end, count = list_short_blocks(
            cache.records,
            cache.layout.place_of(self),
            self.header_words(shape),
            shape.block_size,
            block_table,
            rows,
            lengths,
            tags,
            (first, min(end, len(rows))),
            scratch("owners", (len(cache.records),), np.int32),
            blocks,
            wanted,
            groups,
        )
        return end, (blocks[:count], wanted[:count], groups[:count])


@functools.lru_cache(maxsize=8)
def _states(index: LearnedIndex, shape: BlockShape) -> LearnedStates:
    return LearnedStates(index.state_width(shape))


@functools.lru_cache(maxsize=64)
def _named_sizes(block_size: int) -> np.ndarray:
    """Of what stamps name: 16, 32, ... keys of a block, and all of them."""
    sizes = [_SMALLEST_NAMED << k for k in range(block_size.bit_length())]
    return np.array([size for size in sizes if size < block_size] + [block_size], np.int64)


@functools.lru_cache(maxsize=4096)
def _digest_of(index: LearnedIndex, shape: BlockShape, layer_index: int) -> Any:
    return hashlib.blake2b(repr((index, shape, layer_index)).encode(), digest_size=16)


def stored_headers(index: LearnedIndex, cache: LayerCache) -> tuple[torch.Tensor, torch.Tensor]:
    """What headers say (for tests and for whoever looks into a cache).

    Returns:
        Counts and tags, each `[num_blocks, num_kv_heads]`, int64.
    """
    words = index.header_words(cache.layout.shape)
    header = cache.stored(index)[..., : 8 * words]
    header = header.contiguous().view(torch.int64)
    return header[..., COUNT], header[..., TAG]
