"""Steps of no request, for layers whose caches are there and empty: to measure, or to compile."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import CommonAttentionMetadata

if TYPE_CHECKING:
    from vllm_sparse_plugin.device_metadata import DeviceMetadataBuilder


def layers_of(vllm_config: VllmConfig, builder: DeviceMetadataBuilder) -> list[Any]:
    """The layers of a KV cache group that can be sparse, at least one.

    Args:
        vllm_config: Of the engine.
        builder: Of the group.
    """
    names = list(builder.sparse_layers)
    return list(get_layers_from_vllm_config(vllm_config, Attention, names).values())


@dataclass(frozen=True)
class LayerGroup:
    """The layers of a KV cache group, and inputs for them.

    Attributes:
        layers: Those that can be sparse.
        query: `[max_rows, num_heads, head_size]`.
        key: `[max_rows, num_kv_heads, head_size]`, of the new tokens, which are in no cache.
        output: As `query`.
        random: Where random numbers come from: not from where tokens are sampled.
    """

    layers: list[Any]
    query: torch.Tensor
    key: torch.Tensor
    output: torch.Tensor
    random: torch.Generator

    @classmethod
    def of(cls, layers: list[Any], max_rows: int, dtype: torch.dtype) -> LayerGroup:
        """Random queries for some layers, of the model's type."""
        cache, shape = layers[0].kv_cache, layers[0].impl
        random = torch.Generator(cache.device).manual_seed(0)
        query, key = (
            torch.randn(
                max_rows,
                heads,
                shape.head_size,
                generator=random,
                dtype=dtype,
                device=cache.device,
            )
            for heads in (shape.num_heads, shape.num_kv_heads)
        )
        return cls(layers, query, key, torch.empty_like(query), random)

    def attend(self, metadata: Any, rows: int) -> None:
        """All layers, one after the other.

        Args:
            metadata: Of a step.
            rows: Of it.
        """
        query, key, output = self.query[:rows], self.key[:rows], self.output[:rows]
        for layer in self.layers:
            layer.impl.forward(layer, query, key, key, layer.kv_cache, metadata, output)

    def fill(self, num_blocks: int, at_once: int) -> None:
        """Writes random keys into the first blocks of each layer.

        Args:
            num_blocks: How many, block 0 left out: vLLM pads with it.
            at_once: Tokens that are written at a time.
        """
        device, dtype = self.key.device, self.key.dtype
        for layer in self.layers:
            block_size = layer.kv_cache.shape[2]
            slots = torch.arange(block_size, (num_blocks + 1) * block_size, device=device)
            for start in range(0, len(slots), at_once):
                part = slots[start : start + at_once]
                shape = (2, len(part), *self.key.shape[1:])
                new = torch.randn(shape, generator=self.random, dtype=dtype, device=device)
                layer.impl.do_kv_cache_update(layer, new[0], new[1], layer.kv_cache, part)

    def empty(self, num_blocks: int) -> None:
        """Leaves the blocks as they were found."""
        for layer in self.layers:
            layer.kv_cache[1 : num_blocks + 1].zero_()


def decode_batch(
    rows: int, keys: int, longest: int, kv_cache: torch.Tensor
) -> CommonAttentionMetadata:
    """Requests that decode, each with blocks of its own.

    Args:
        rows: How many.
        keys: That each sees.
        longest: That kernels are to be ready for.
        kv_cache: Of a layer; block 0 is not used.
    """
    device, block_size = kv_cache.device, kv_cache.shape[2]
    blocks = -(-keys // block_size)
    # As wide as a multiple of 16, like most of vLLM's: kernels are compiled for that.
    table = torch.zeros((rows, -(-blocks // 16) * 16), dtype=torch.int32, device=device)
    own = torch.arange(1, rows * blocks + 1, dtype=torch.int32, device=device)
    table[:, :blocks] = own.view(rows, blocks)
    lengths = torch.full((rows,), keys, dtype=torch.int32)
    starts = torch.arange(rows + 1, dtype=torch.int32)
    return CommonAttentionMetadata(
        query_start_loc=starts.to(device),
        query_start_loc_cpu=starts,
        seq_lens=lengths.to(device),
        seq_lens_cpu_upper_bound=lengths,
        num_reqs=rows,
        num_actual_tokens=rows,
        max_query_len=1,
        max_seq_len=longest,
        block_table_tensor=table,
        slot_mapping=torch.full((rows,), -1, dtype=torch.int64, device=device),
    )
