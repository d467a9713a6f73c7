"""How probable it was to sample keys by their buckets (MagicPIG)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_sparse_plugin.paged.triton_kernels.bucket_collisions import SAMPLED
from vllm_sparse_plugin.paged.triton_kernels.cache_rows import DeviceBatch
from vllm_sparse_plugin.paged.triton_kernels.grids import launched
from vllm_sparse_plugin.paged.triton_kernels.tiles import (
    block_bytes,
    padded,
    rows_at_once,
    splits_of,
)


@triton.jit
def _arc_cosine(x):
    """Of float64s in [-1, 1], within 2e-8 (Abramowitz and Stegun, 4.4.46)."""
    size = tl.abs(x)
    sums = size * -0.0012624911 + 0.0066700901
    sums = sums * size - 0.0170881256
    sums = sums * size + 0.0308918810
    sums = sums * size - 0.0501743046
    sums = sums * size + 0.0889789874
    sums = sums * size - 0.2145988016
    sums = sums * size + 1.5707963050
    angle = tl.sqrt(1.0 - size) * sums
    return tl.where(x < 0, 3.141592653589793 - angle, angle)


@triton.jit
def _power(base, exponent: tl.constexpr):
    """Of float64s in [0, 1]; 1e-300 stands for 0."""
    return tl.exp(tl.log(tl.maximum(base, 1e-300)) * exponent)


@triton.jit
def _sampling_probability(cosine, TABLES: tl.constexpr, BITS: tl.constexpr):
    """See `MagicPig.sampling_probability`; float64."""
    cosine = tl.minimum(tl.maximum(cosine.to(tl.float64), -1.0), 1.0)
    hit = _power(1.0 - _arc_cosine(cosine) / 3.141592653589793, BITS)
    miss = 1.0 - hit
    chance = 1.0 - _power(miss, TABLES) - TABLES * hit * _power(miss, TABLES - 1)
    return tl.minimum(tl.maximum(chance, 1e-12), 1.0)


@launched
def _weigh_collisions(
    query,
    cache,
    block_table,
    rows,
    lengths,
    places,
    states,
    flags,
    probability,
    reads,
    table_stride,
    states_stride,
    query_stride,
    stride,
    BLOCK_BYTES: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    CHANNELS: tl.constexpr,
    TABLES: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_TILE: tl.constexpr,
    SAMPLED: tl.constexpr,
    KEYS: tl.constexpr,
):
    index, kv_head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + index)
    blocks = block_table + tl.load(rows + index).to(tl.int64) * table_stride
    unit = (index * tl.num_programs(1) + kv_head) * GROUP
    heads, channels = tl.arange(0, GROUP_TILE)[:, None], tl.arange(0, CHANNELS)[None, :]
    inside = channels < HEAD_SIZE
    mean = states + tl.load(places + index).to(tl.int64) * states_stride + kv_head * HEAD_SIZE
    for tile in tl.range(split, tl.cdiv(length, KEYS), tl.num_programs(2)):
        columns = tile * KEYS + tl.arange(0, KEYS)
        there = columns < length
        flag = tl.load(
            flags + (unit + heads) * stride + columns[None, :],
            mask=there[None, :] & (heads < GROUP),
            other=0,
        )
        sampled = tl.max((flag == SAMPLED).to(tl.int32), axis=0) > 0
        number = tl.sum(sampled.to(tl.int64), axis=0)
        if number > 0:
            block = tl.load(blocks + columns // BLOCK_SIZE, mask=there, other=0).to(tl.int64)
            row = kv_head * BLOCK_SIZE + columns % BLOCK_SIZE
            memory = (cache.to(tl.pointer_type(tl.uint8)) + block * BLOCK_BYTES).to(cache.dtype)
            keys = (memory + row * (2 * HEAD_SIZE))[:, None] + channels
            mask = sampled[:, None] & inside
            centred = tl.load(keys, mask=mask, other=0.0).to(tl.float32)
            centred -= tl.load(mean + channels, mask=inside, other=0.0)
            centred = tl.where(mask, centred, 0.0)
            length_of_key = tl.sqrt(tl.sum(centred * centred, axis=1))
            for head in tl.static_range(GROUP):
                start = query + index * query_stride + (kv_head * GROUP + head) * HEAD_SIZE
                mine = tl.load(start + channels, mask=inside, other=0.0).to(tl.float32)
                product = tl.sum(centred * mine, axis=1)
                size = tl.sqrt(tl.sum(mine * mine, axis=1)) * length_of_key
                cosine = product / tl.maximum(size, 1.1754943508222875e-38)
                chance = _sampling_probability(cosine, TABLES, BITS).to(tl.float32)
                place = (unit + head) * stride + columns
                is_own = tl.load(flags + place, mask=there, other=0) == SAMPLED
                tl.store(probability + place, chance, mask=is_own)
            # Integers: in any order the sum is the same.
            tl.atomic_add(reads + index * 3 + 2, number)


def weigh_collisions(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    batch: DeviceBatch,
    tables: int,
    bits: int,
    states: torch.Tensor,
    flags: torch.Tensor,
    key_probability: torch.Tensor,
    reads: torch.Tensor,
) -> None:
    """The probabilities of sampled keys, each of which is loaded once for a group's query heads.

    Args:
        query: `[num_queries, num_heads, head_size]`, the heads of a query side by side.
        kv_cache: See the package.
        batch: See `flag_collisions`.
        tables: L.
        bits: Of a table, K.
        states: See `sign_keys`; zeros where nothing is subtracted.
        flags: See `flag_collisions`.
        key_probability: As `flags`, float32; written for sampled keys.
        reads: `[num_queries, 3]`, int64: how many keys were loaded is added, see `read_counts`.
    """
    assert batch.places is not None
    num_queries, num_heads, head_size = query.shape
    kv_heads, block_size = kv_cache.shape[1:3]
    if num_queries == 0:
        return
    group, channels, capacity = num_heads // kv_heads, padded(head_size), flags.shape[1]
    keys = rows_at_once(2 * channels, most=64)
    splits = splits_of(num_queries * kv_heads, -(-capacity // keys))
    _weigh_collisions[(num_queries, kv_heads, splits)](
        query,
        kv_cache,
        batch.block_table,
        batch.rows,
        batch.lengths,
        batch.places,
        states,
        flags,
        key_probability,
        reads,
        batch.block_table.stride(0),
        states.stride(0),
        query.stride(0),
        capacity,
        BLOCK_BYTES=block_bytes(kv_cache),
        BLOCK_SIZE=block_size,
        HEAD_SIZE=head_size,
        CHANNELS=channels,
        TABLES=tables,
        BITS=bits,
        GROUP=group,
        GROUP_TILE=padded(group),
        SAMPLED=SAMPLED,
        KEYS=keys,
    )
