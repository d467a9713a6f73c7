"""The base of indices on the device whose codes are made with something learned."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable

import torch

from vllm_sparse_plugin.paged.cache_scales import UNSCALED, CacheScales
from vllm_sparse_plugin.paged.device.indices.base import DeviceIndex
from vllm_sparse_plugin.paged.device.sequences import Change, StepSequences, prefix_of
from vllm_sparse_plugin.paged.device.space import DeviceSpace
from vllm_sparse_plugin.paged.layout import BlockLayout, gathered
from vllm_sparse_plugin.paged.learned_index import LearnedIndex
from vllm_sparse_plugin.paged.triton_kernels.cache_rows import DeviceBatch, key_value_rows
from vllm_sparse_plugin.paged.triton_kernels.learned_blocks import digest_keys, note_writes


class DeviceLearnedIndex(DeviceIndex):
    """See `LearnedIndex`: the same headers and codes, but who learns what is planned by the host.

    A block has the codes of the sequence that was new, or had doubled, last of those that share it.
    Maskers make the codes that others miss from the keys, each time.

    Attributes:
        states: `[places, width]`, float32: what was learned.
        tags: `[places]`, int64: a digest of the keys that it was learned from.
        has_states: Whether anything is learned at all; else all sequences want the same codes.
    """

    index: LearnedIndex
    has_states: bool = True

    def __init__(
        self, index: LearnedIndex, layout: BlockLayout, layer_index: int, space: DeviceSpace
    ) -> None:
        """Asks for the memory of the states."""
        super().__init__(index, layout, layer_index, space)
        self._capacity, self._device = space.capacity, space.device
        self._is_reserved = False
        size = (space.max_sequences, index.state_width(self.shape))
        self.states = torch.zeros(size, dtype=torch.float32, device=space.device)
        self.tags = torch.zeros(space.max_sequences, dtype=torch.int64, device=space.device)

    @abstractmethod
    def encode(
        self, kv_cache: torch.Tensor, batch: DeviceBatch, num_blocks: int | None = None
    ) -> None:
        """Makes the codes that blocks lack.

        Args:
            kv_cache: See `triton_kernels`.
            batch: Sequences, with their places: each sees the keys that need codes.
            num_blocks: Of the only sequence; None: each sequence's last block.
        """

    @abstractmethod
    def learn(self, read: Callable[[torch.Tensor], torch.Tensor], count: int) -> torch.Tensor:
        """A state, of any shape.

        Args:
            read: Gives the keys at some positions `[n]`, int64, of a sequence: as
                `[n, num_kv_heads, head_size]`, of the cache's type.
            count: Of the first keys, that it is learned from.
        """

    def update(
        self,
        kv_cache: torch.Tensor,
        slots: torch.Tensor,
        key: torch.Tensor | None = None,
        value: torch.Tensor | None = None,
        scales: CacheScales = UNSCALED,
    ) -> None:
        """See `DeviceIndex.update`: written keys have no codes until a query needs them."""
        note_writes(kv_cache, self.place, slots)

    def prepare(self, kv_cache: torch.Tensor, sequences: StepSequences) -> None:
        """Learns what is to be learned, and makes the codes that queries need.

        It only launches; where nothing has changed it asks for no memory either.

        Args:
            kv_cache: See `triton_kernels`.
            sequences: Of the queries.
        """
        for change in sequences.changes:
            one = sequences.batch.part(slice(change.number, change.number + 1))
            if change.prefix and self.has_states:
                self._learn_from(kv_cache, one, change)
            # One after the other: they may share blocks, and want different codes of them.
            self.encode(kv_cache, one, -(-change.length // self.shape.block_size))
        self.encode(kv_cache, sequences.batch)

    def reserve(self) -> None:
        """Takes, and gives back, the memory that learning needs."""
        if self._is_reserved:  # vLLM has looked; it may come again, for other reasons
            return
        self._is_reserved = True
        shape = self.shape

        def read(places: torch.Tensor) -> torch.Tensor:
            size = (len(places), shape.num_kv_heads, shape.head_size)
            return _numbers(torch.zeros(size, dtype=shape.dtype, device=self._device))

        self.learn(read, prefix_of(self._capacity))

    def _learn_from(self, kv_cache: torch.Tensor, one: DeviceBatch, change: Change) -> None:
        head_size, size = self.shape.head_size, self.shape.block_size
        place = slice(change.place, change.place + 1)
        digest_keys(kv_cache, one.block_table, one.rows, change.prefix, head_size, self.tags[place])
        blocks = one.block_table.index_select(0, one.rows)[0].long()
        rows = key_value_rows(kv_cache, head_size)

        def read(places: torch.Tensor) -> torch.Tensor:
            own = (blocks[places // size], slice(None), places % size, slice(head_size))
            return _numbers(gathered(rows, *own))

        self.states[place] = self.learn(read, change.prefix).reshape(1, -1)


def _numbers(keys: torch.Tensor) -> torch.Tensor:
    """What torch can add up: keys of 8 bits as float32."""
    return keys.float() if keys.dtype.itemsize == 1 else keys
