"""One decoding row with random keys: what kernels are compiled and measured with."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from vllm_sparse_plugin.paged.attention import QueryBatch
from vllm_sparse_plugin.paged.layout import BlockLayout, LayerCache


@dataclass(frozen=True)
class RandomRow:
    """A query and its keys.

    Attributes:
        query: `[1, num_heads, head_size]`, float32.
        cache: Of one layer, which holds nothing else.
        batch: Of the query, which sees every key.
    """

    query: np.ndarray
    cache: LayerCache
    batch: QueryBatch


def random_row(layout: BlockLayout, num_keys: int, layer: int) -> RandomRow:
    """Writes keys, values and their index.

    Args:
        layout: Of the blocks.
        num_keys: At least 1.
        layer: Index of the attention layer.
    """
    shape = layout.shape
    num_blocks = -(-num_keys // shape.block_size)
    width = layout.bytes_per_token // shape.dtype.itemsize
    kv_cache = torch.zeros(
        num_blocks, shape.num_kv_heads, shape.block_size, width, dtype=shape.dtype
    )
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, shape.num_heads, shape.head_size, generator=generator)
    key = torch.randn(num_keys, shape.num_kv_heads, shape.head_size, generator=generator)
    key = key.to(shape.dtype)
    cache = LayerCache.of(kv_cache, layout, layer)
    cache.write(key, key, torch.arange(num_keys))
    batch = QueryBatch(
        np.arange(num_blocks, dtype=np.int32)[None],
        np.zeros(1, np.int32),
        np.full(1, num_keys, np.int32),
    )
    return RandomRow(query.numpy(), cache, batch)
