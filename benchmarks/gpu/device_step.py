"""A decode step of some layers with the plugin's kernels, and what the reference makes of it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from benchmarks.gpu import byte_counts
from benchmarks.gpu.dense_baselines import keys_and_values
from benchmarks.gpu.paged_data import (
    WRITTEN_AT_ONCE,
    Sequences,
    empty_cache,
    fill,
    random_heads,
)
from benchmarks.gpu.sparse_configs import Maskers
from sparse_attention_hub.sparse_attention.serialization import config_from_dict, config_to_json
from vllm_sparse_plugin.masked_attention import attend_row, attention_of
from vllm_sparse_plugin.paged.device.attention import DeviceAttention
from vllm_sparse_plugin.paged.device.cache import DeviceCache
from vllm_sparse_plugin.paged.device.sequences import Change, StepSequences, prefix_of
from vllm_sparse_plugin.paged.device.space import DeviceSpace
from vllm_sparse_plugin.paged.layout import BlockLayout, BlockShape
from vllm_sparse_plugin.paged.served import indices_of
from vllm_sparse_plugin.paged.triton_kernels.cache_rows import DeviceBatch


@dataclass
class DeviceStep:
    """One query per sequence.

    Attributes:
        maskers: As a server is configured with them.
        attention: The plugin's.
        sequences: What the caches hold.
        caches: Of each layer.
        query: `[count, num_heads, head_size]`.
        output: Likewise; written.
        counts: `[count, 3]`, int64; added to, see `DeviceAttention`.
        sizes: What follows from lengths alone.
        batch: Of the queries.
    """

    maskers: Maskers
    attention: DeviceAttention
    sequences: Sequences
    caches: list[DeviceCache]
    query: torch.Tensor
    output: torch.Tensor
    counts: torch.Tensor
    sizes: torch.Tensor
    batch: DeviceBatch

    @classmethod
    def of(
        cls,
        maskers: Maskers,
        shape: BlockShape,
        count: int,
        keys: int,
        layers: int,
        device: torch.device,
    ) -> DeviceStep:
        """Fills caches and asks for workspaces.

        Args:
            maskers: Of all layers.
            shape: Of each.
            count: Sequences.
            keys: Of each.
            layers: That are computed one after the other.
            device: Of the kernels.
        """
        config = config_from_dict({"maskers": maskers})
        layout = BlockLayout(shape, tuple(indices_of([config], shape)))
        sequences = Sequences.of(count, keys, shape.block_size, device)
        capacity = -(-keys // 16) * 16
        space = DeviceSpace(shape, count, capacity, WRITTEN_AT_ONCE, device, max_sequences=count)
        caches = []
        for layer in range(layers):
            cache = DeviceCache.of(empty_cache(layout, sequences), layout, layer, space)
            fill(cache.write, shape, sequences, seed=layer)
            caches.append(cache)
        generator = torch.Generator(device).manual_seed(3)
        query = random_heads(count, shape.num_heads, shape, generator)
        attention = DeviceAttention(config.masker_configs, space)
        lengths = np.full(count, keys, np.int32)
        step = cls(
            maskers,
            attention,
            sequences,
            caches,
            query,
            torch.empty_like(query),
            torch.zeros(count, 3, dtype=torch.int64, device=device),
            torch.from_numpy(attention.sizes(lengths)).to(device),
            replace(sequences.batch, places=torch.arange(count, dtype=torch.int32, device=device)),
        )
        step.learn()
        return step

    def learn(self) -> None:
        """What maskers learn from new sequences, in all layers: no part of the steps after it."""
        keys, prefix = self.sequences.keys, prefix_of(self.sequences.keys)
        numbers = range(self.sequences.count)
        changes = tuple(Change(number, number, keys, prefix) for number in numbers)
        for layer in range(len(self.caches)):
            self._attend(layer, changes)

    @property
    def layout(self) -> BlockLayout:
        """Of the caches."""
        return self.caches[0].layout

    def plan(self) -> None:
        """What the host does once per step, for all layers."""
        lengths = np.full(self.sequences.count, self.sequences.keys, np.int32)
        self.sizes.copy_(torch.from_numpy(self.attention.sizes(lengths)))

    def attend(self, layer: int) -> None:
        """What each layer does."""
        self._attend(layer, ())

    def _attend(self, layer: int, changes: tuple[Change, ...]) -> None:
        self.attention.attend(
            self.query,
            self.caches[layer],
            self.batch,
            self.sizes,
            self.layout.shape.head_size**-0.5,
            self.output,
            self.counts,
            StepSequences(self.batch, changes),
        )

    def densities(self) -> tuple[float, float]:
        """Keys that query heads select, and rows that are loaded for that, per key that there is.

        A row is loaded once for all query heads of a group; so are the keys, in order to select.
        """
        self.counts.zero_()
        self.attend(0)
        selected, loaded, scored = self.counts.sum(0).tolist()
        shape, keys = self.layout.shape, self.sequences.count * self.sequences.keys
        rows = loaded + scored / 2  # of these the keys alone
        return selected / (keys * shape.num_heads), rows / (keys * shape.num_kv_heads)

    @property
    def index_share(self) -> float:
        """Bytes of all indices, per byte of keys and values: they are read whole."""
        shape = self.layout.shape
        indices = sum(index.bytes_per_block(shape) for index in self.layout.indices)
        return byte_counts.index_share(indices, shape.block_size, shape.key_value_bytes)

    def stored(self, layer: int, sequence: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a sequence, each `[1, num_kv_heads, keys, head_size]`, on the host."""
        table = self.sequences.batch.block_table[sequence].long()
        rows = self.caches[layer].rows()[table].transpose(0, 1).flatten(1, 2)
        rows = rows[None, :, : self.sequences.keys].float().cpu()
        key, value = keys_and_values(rows)
        return key.contiguous(), value.contiguous()


def relative_error(step: DeviceStep, layer: int = 0) -> float:
    """Of a layer's output: the norm of its difference to the reference's own masker objects'.

    Args:
        step: Small: the reference takes every key of every head into its hands.
        layer: Which.
    """
    config = config_to_json(config_from_dict({"maskers": step.maskers}))
    step.attend(layer)
    found, expected = step.output.float().cpu(), []
    for sequence in range(step.sequences.count):
        query = step.query[sequence : sequence + 1].float().cpu()
        result = attend_row(
            attention_of(config),
            query,
            *step.stored(layer, sequence),
            step.layout.shape.head_size**-0.5,
            layer,
        )
        expected.append(result.output.view_as(query))
    wanted = torch.cat(expected)
    return float((found - wanted).norm() / wanted.norm())
