"""Exact scores of every key: what the oracle needs."""

from __future__ import annotations

import torch
import triton.language as tl

from vllm_sparse_plugin.paged.triton_kernels.grids import launched
from vllm_sparse_plugin.paged.triton_kernels.tiles import (
    block_bytes,
    load_queries,
    padded,
    rows_at_once,
    splits_of,
    store_scores,
)


@launched
def _score_keys(
    query,
    cache,
    block_table,
    rows,
    lengths,
    scores,
    query_stride,
    head_stride,
    table_stride,
    scores_stride,
    scores_head_stride,
    BLOCK_ELEMENTS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_TILE: tl.constexpr,
    KEYS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    index, kv_head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + index)
    table = block_table + tl.load(rows + index).to(tl.int64) * table_stride
    channels = tl.arange(0, CHANNELS)
    inside = channels < HEAD_SIZE
    query += index * query_stride + kv_head * GROUP * head_stride
    scores += index * scores_stride + kv_head * GROUP * scores_head_stride
    own = load_queries(query, head_stride, channels, inside, GROUP, GROUP_TILE)
    for tile in tl.range(split, tl.cdiv(length, KEYS), tl.num_programs(2)):
        places = tile * KEYS + tl.arange(0, KEYS)
        present = places < length
        block = tl.load(table + places // BLOCK_SIZE, mask=present, other=0).to(tl.int64)
        start = block * BLOCK_ELEMENTS
        start += (kv_head * BLOCK_SIZE + places % BLOCK_SIZE) * (2 * HEAD_SIZE)
        keys = tl.load(
            cache + start[:, None] + channels[None, :],
            mask=present[:, None] & inside[None, :],
            other=0.0,
        ).to(tl.float32)
        # No matrix product: tensor cores would round float32 queries to 10 bits.
        sums = tl.sum(own[:, None, :] * keys[None, :, :], axis=2)
        store_scores(scores, scores_head_stride, tile * KEYS, length, sums, GROUP)


def score_keys(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    rows: torch.Tensor,
    lengths: torch.Tensor,
    scores: torch.Tensor,
) -> None:
    """Unscaled dot products of each query with every key that it sees.

    Args:
        query: `[num_queries, num_heads, head_size]`, of any float type; channels side by side.
        kv_cache: See the package; so the others.
        block_table: Of the batch.
        rows: Of the queries.
        lengths: Of the queries.
        scores: A column per key; written.
    """
    num_queries, num_heads, head_size = query.shape
    if num_queries == 0:
        return
    kv_heads = kv_cache.shape[1]
    group, channels = num_heads // kv_heads, padded(head_size)
    keys = rows_at_once(padded(group), channels, most=64)
    splits = splits_of(num_queries * kv_heads, -(-scores.shape[2] // keys))
    _score_keys[(num_queries, kv_heads, splits)](
        query,
        kv_cache,
        block_table,
        rows,
        lengths,
        scores,
        query.stride(0),
        query.stride(1),
        block_table.stride(0),
        scores.stride(0),
        scores.stride(1),
        BLOCK_ELEMENTS=block_bytes(kv_cache) // kv_cache.itemsize,
        BLOCK_SIZE=kv_cache.shape[2],
        HEAD_SIZE=head_size,
        GROUP=group,
        GROUP_TILE=padded(group),
        KEYS=keys,
        CHANNELS=channels,
        enable_fp_fusion=False,
    )
