"""A decode step of some layers with the plugin's kernels, and what the reference makes of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.gpu import byte_counts
from benchmarks.gpu.dense_baselines import keys_and_values
from benchmarks.gpu.paged_data import Sequences, filled_cache, random_heads
from sparse_attention_hub.sparse_attention.serialization import config_from_dict, config_to_json
from vllm_sparse_plugin.masked_attention import attend_row, attention_of
from vllm_sparse_plugin.paged.layout import BlockLayout, BlockShape
from vllm_sparse_plugin.paged.served import indices_of


@dataclass
class DeviceStep:
    """One query per sequence.

    Attributes:
        maskers: As a server is configured with them.
        layout: Of the caches.
        sequences: What they hold.
        caches: Of each layer.
        attentions: The plugin's, of each layer.
        query: `[count, num_heads, head_size]`.
        output: Likewise; written.
    """

    maskers: list[dict[str, Any]]
    layout: BlockLayout
    sequences: Sequences
    caches: list[torch.Tensor]
    attentions: list[Any]
    query: torch.Tensor
    output: torch.Tensor

    @classmethod
    def of(
        cls,
        maskers: list[dict[str, Any]],
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
        from vllm_sparse_plugin.paged.device.attention import DeviceAttention
        from vllm_sparse_plugin.paged.device.cache import DeviceCache
        from vllm_sparse_plugin.paged.device.space import DeviceSpace

        config = config_from_dict({"maskers": maskers})
        layout = BlockLayout(shape, tuple(indices_of([config], shape)))
        sequences = Sequences.of(count, keys, shape.block_size, device)
        space = DeviceSpace.of(shape, count, -(-keys // 16) * 16, device)
        caches, attentions = [], []
        for layer in range(layers):

            def write(
                cache: torch.Tensor,
                key: torch.Tensor,
                value: torch.Tensor,
                slots: torch.Tensor,
                layer: int = layer,
            ) -> None:
                DeviceCache(cache, layout, layer).write(key, value, slots)

            caches.append(filled_cache(layout, sequences, write, seed=layer))
            attentions.append(DeviceAttention(config.masker_configs, layout, layer, space))
        generator = torch.Generator(device).manual_seed(3)
        query = random_heads(count, shape.num_heads, shape, generator)
        step = cls(maskers, layout, sequences, caches, attentions, query, torch.empty_like(query))
        step.plan()
        return step

    def plan(self) -> None:
        """What is done once per step, for all layers."""
        self.attentions[0].plan(self.sequences.batch.lengths)

    def attend(self, layer: int) -> None:
        """What each layer does."""
        self.attentions[layer].attend(
            self.query,
            self.caches[layer],
            self.sequences.batch,
            self.layout.shape.head_size**-0.5,
            self.output,
        )

    @property
    def index_share(self) -> float:
        """Bytes of all indices, per byte of keys and values: they are read whole."""
        shape = self.layout.shape
        indices = sum(index.bytes_per_block(shape) for index in self.layout.indices)
        return byte_counts.index_share(indices, shape.block_size, shape.key_value_bytes)

    def stored(self, layer: int, sequence: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a sequence, each `[1, num_kv_heads, keys, head_size]`, on the host."""
        shape = self.layout.shape
        size = shape.num_kv_heads * shape.block_size * 2 * shape.head_size
        table = self.sequences.batch.block_table[sequence].long()
        blocks = self.caches[layer][table].flatten(1)[:, :size]
        # Behind them are the indices; of each head, a row of key and value per token.
        rows = blocks.reshape(-1, shape.num_kv_heads, shape.block_size, 2 * shape.head_size)
        rows = rows.transpose(0, 1).flatten(1, 2)[None, :, : self.sequences.keys].float().cpu()
        key, value = keys_and_values(rows)
        return key.contiguous(), value.contiguous()


def relative_error(step: DeviceStep, layer: int = 0) -> float:
    """Of a layer's output: the norm of its difference to the reference's own masker objects'.

    Args:
        step: Small: the reference takes every key of every head into its hands.
        layer: Which.
    """
    config = config_to_json(config_from_dict({"maskers": step.maskers}))
    step.plan()
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
