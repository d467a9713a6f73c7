"""Rows of keys in scattered blocks, and what the general path makes of them."""

from dataclasses import dataclass

import numpy as np
import torch

from sparse_attention_hub.sparse_attention.serialization import config_from_dict, config_to_json
from vllm_sparse_plugin.masked_attention import attend_row, attention_of
from vllm_sparse_plugin.paged.attention import PagedAttention, QueryBatch, ReadCounts
from vllm_sparse_plugin.paged.cache_scales import UNSCALED, CacheScales
from vllm_sparse_plugin.paged.layout import BlockLayout, BlockShape, LayerCache, stored_as

SINK_LOCAL = [{"type": "sink", "sink_size": 4}, {"type": "local", "window_size": 12}]
# One token, both sides of a page of 8 or 16 and of a block of 32, and several blocks.
LENGTHS = (1, 7, 8, 17, 31, 32, 33, 97, 300)


def shape_of(
    heads: int = 8,
    kv_heads: int = 2,
    head_size: int = 32,
    block_size: int = 32,
    dtype: torch.dtype = torch.float32,
) -> BlockShape:
    return BlockShape(block_size, heads, kv_heads, head_size, dtype)


@dataclass
class Rows:
    """Sequences of one batch, in a cache whose unused parts are NaN, blocks in any order."""

    cache: LayerCache
    kv_cache: torch.Tensor
    batch: QueryBatch
    query: torch.Tensor
    keys: list[torch.Tensor]
    values: list[torch.Tensor]


def integers(*size: int, generator: torch.Generator) -> torch.Tensor:
    """Small integers: float32 sums of their products are exact in any order."""
    return torch.randint(-8, 9, size, generator=generator).float()


def make_rows(
    layout: BlockLayout,
    lengths=LENGTHS,
    seed: int = 0,
    exact: bool = True,
    layer_index: int = 0,
    spare_keys: int = 0,
    scales: CacheScales = UNSCALED,
) -> Rows:
    """Writes rows in chunks of random size; each has one query, its last key's.

    `spare_keys` more are stored than the query sees, as for a query in the middle of a chunk. Of a
    cache of 8 bits, the rows' keys and values are those that are stored, as float32.
    """
    shape = layout.shape
    dtype = model_dtype(shape)
    generator = torch.Generator().manual_seed(seed)
    random = np.random.default_rng(seed)

    def numbers(*size: int) -> torch.Tensor:
        if exact:
            return integers(*size, generator=generator).to(dtype)
        return torch.randn(*size, generator=generator).to(dtype)

    def kept(rows: torch.Tensor, scale: float) -> torch.Tensor:
        if shape.dtype.itemsize > 1:
            return rows
        return stored_as(rows, shape.dtype, scale).float() * scale

    stored = [length + spare_keys for length in lengths]
    counts = [-(-length // shape.block_size) for length in stored]
    width = layout.bytes_per_token // shape.dtype.itemsize
    num_blocks = sum(counts) + 3
    kv_cache = torch.full(
        (num_blocks, shape.num_kv_heads, shape.block_size, width), torch.nan, dtype=shape.dtype
    )
    cache = LayerCache.of(kv_cache, layout, layer_index, scales)
    blocks = random.permutation(num_blocks)
    table = np.full((len(stored), max(counts) + 2), num_blocks + 1000, np.int32)
    keys, values, used = [], [], 0
    for row, (length, count) in enumerate(zip(stored, counts, strict=True)):
        table[row, :count] = blocks[used : used + count]
        used += count
        key = numbers(length, shape.num_kv_heads, shape.head_size)
        value = torch.randn(key.shape, generator=generator).to(dtype)
        place = torch.arange(length)
        slots = torch.from_numpy(table[row])[place // shape.block_size].long() * shape.block_size
        slots += place % shape.block_size
        start = 0
        while start < length:
            end = min(length, start + int(random.integers(1, 70)))
            # Padding, as vLLM has at the end of a step.
            padded = torch.cat([slots[start:end], torch.tensor([-1, -1])])
            cache.write(key[start:end], value[start:end], padded)
            start = end
        keys.append(kept(key, scales.key).transpose(0, 1)[None])
        values.append(kept(value, scales.value).transpose(0, 1)[None])
    batch = QueryBatch(
        table, np.arange(len(stored), dtype=np.int32), np.array(lengths, dtype=np.int32)
    )
    query = numbers(len(stored), shape.num_heads, shape.head_size)
    return Rows(cache, kv_cache, batch, query, keys, values)


def model_dtype(shape: BlockShape) -> torch.dtype:
    """Of queries and keys, before these are stored."""
    return torch.float32 if shape.dtype.itemsize == 1 else shape.dtype


def paged_attention(maskers: list[dict], shape: BlockShape) -> tuple[PagedAttention, BlockLayout]:
    """The fast path of some maskers, and blocks with all that it needs."""
    attention = PagedAttention(config_from_dict({"maskers": maskers}).masker_configs, shape)
    indices = dict.fromkeys(index for masker in attention.maskers for index in masker.indices)
    return attention, BlockLayout(shape, tuple(indices))


def attend(attention: PagedAttention, rows: Rows) -> tuple[torch.Tensor, ReadCounts]:
    scaling = rows.query.shape[-1] ** -0.5
    output, read = attention.attend(rows.query.float().numpy(), rows.cache, rows.batch, scaling)
    return torch.from_numpy(output), read


def general(maskers: list[dict], rows: Rows) -> tuple[torch.Tensor, list[int]]:
    """Outputs in float32, and keys read, of the reference's own code on each row."""
    attention = attention_of(config_to_json(config_from_dict({"maskers": maskers})))
    outputs, read = [], []
    for row, length in enumerate(rows.batch.lengths.tolist()):
        result = attend_row(
            attention,
            rows.query[row : row + 1],
            rows.keys[row][:, :, :length],
            rows.values[row][:, :, :length],
            rows.query.shape[-1] ** -0.5,
            rows.cache.layer_index,
        )
        outputs.append(result.output.float())
        read.append(result.read_keys)
    return torch.cat(outputs), read
