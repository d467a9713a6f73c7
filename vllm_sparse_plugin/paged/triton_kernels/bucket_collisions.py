"""Keys that share buckets with a query (MagicPIG) are sampled; see `bucket_weights`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_sparse_plugin.paged.triton_kernels.bucket_signatures import (
    STORED,
    TOKENS,
    buckets_of,
    tables_at_once,
)
from vllm_sparse_plugin.paged.triton_kernels.cache_rows import DeviceBatch
from vllm_sparse_plugin.paged.triton_kernels.grids import launched
from vllm_sparse_plugin.paged.triton_kernels.learned_blocks import (
    coded_tokens,
    header_of,
    span_without_codes,
    tokens_without_codes,
)
from vllm_sparse_plugin.paged.triton_kernels.tiles import (
    block_bytes,
    padded,
    splits_of,
)

SAMPLED = 3
"""The flag of a key that is sampled with a probability of its own."""
_HEADERS = 64
"""Of blocks, looked at together."""
_KEYS = 128
"""Compared together."""


@triton.jit
def _sample(flags, stride, columns, counts, mask, GROUP: tl.constexpr, SAMPLED: tl.constexpr):
    """Flags unselected keys with two collisions or more, `[heads, keys]`."""
    heads = tl.arange(0, counts.shape[0])[:, None]
    target = flags + heads * stride + columns[None, :]
    mask = mask[None, :] & (heads < GROUP) & (counts >= 2)
    flag = tl.load(target, mask=mask, other=1)
    tl.store(target, tl.full(counts.shape, SAMPLED, tl.uint8), mask=mask & (flag == 0))


@launched
def _flag_collisions(
    own,
    cache,
    block_table,
    rows,
    lengths,
    places,
    tags,
    flags,
    table_stride,
    stride,
    BLOCK_BYTES: tl.constexpr,
    OFFSET: tl.constexpr,
    STRIDE: tl.constexpr,
    CODES_AT: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TABLES: tl.constexpr,
    BUCKET: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_TILE: tl.constexpr,
    SAMPLED: tl.constexpr,
    KEYS: tl.constexpr,
):
    index, kv_head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + index)
    blocks = block_table + tl.load(rows + index).to(tl.int64) * table_stride
    tag = tl.load(tags + tl.load(places + index))
    heads = tl.arange(0, GROUP_TILE)[:, None]
    unit = (index * tl.num_programs(1) + kv_head) * GROUP
    for tile in tl.range(split, tl.cdiv(length, KEYS), tl.num_programs(2)):
        columns = tile * KEYS + tl.arange(0, KEYS)
        there = columns < length
        block = tl.load(blocks + columns // BLOCK_SIZE, mask=there, other=0).to(tl.int64)
        header = header_of(cache, block, kv_head, BLOCK_BYTES, OFFSET, STRIDE)
        token = columns % BLOCK_SIZE
        coded = there & (token < coded_tokens(header, tag, there))
        codes = (header.to(tl.pointer_type(tl.uint8)) + CODES_AT).to(tl.pointer_type(BUCKET))
        counts = tl.zeros([GROUP_TILE, KEYS], tl.int32)
        for table in tl.range(TABLES):
            bucket = tl.load(codes + table * BLOCK_SIZE + token, mask=coded, other=0).to(tl.int64)
            mine = tl.load(own + (unit + heads) * TABLES + table, mask=heads < GROUP, other=-1)
            counts += (mine == bucket[None, :]).to(tl.int32)
        _sample(flags + unit * stride, stride, columns, counts, coded, GROUP, SAMPLED)


@launched
def _flag_uncoded(
    own,
    cache,
    block_table,
    rows,
    lengths,
    places,
    tags,
    states,
    projections,
    flags,
    table_stride,
    states_stride,
    stride,
    BLOCK_BYTES: tl.constexpr,
    OFFSET: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    TABLES: tl.constexpr,
    BITS: tl.constexpr,
    BITS_TILE: tl.constexpr,
    AT_ONCE: tl.constexpr,
    HAS_MEAN: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_TILE: tl.constexpr,
    SAMPLED: tl.constexpr,
    BLOCKS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    index, kv_head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + index)
    blocks = block_table + tl.load(rows + index).to(tl.int64) * table_stride
    place = tl.load(places + index).to(tl.int64)
    tag = tl.load(tags + place)
    unit = (index * tl.num_programs(1) + kv_head) * GROUP
    heads = tl.arange(0, GROUP_TILE)[:, None]
    for tile in tl.range(split, tl.cdiv(length, BLOCKS * BLOCK_SIZE), tl.num_programs(2)):
        # None, in most steps.
        first, last = span_without_codes(
            cache,
            blocks,
            tile,
            length,
            tag,
            kv_head,
            BLOCK_BYTES,
            OFFSET,
            STRIDE,
            BLOCK_SIZE,
            BLOCKS,
        )
        for number in tl.range(first, last):
            begin, end, memory = tokens_without_codes(
                cache, blocks, number, length, tag, kv_head, BLOCK_BYTES, OFFSET, STRIDE, BLOCK_SIZE
            )
            for start in tl.range(begin, end, TOKENS):
                tokens = start + tl.arange(0, TOKENS)
                counts = tl.zeros([GROUP_TILE, TOKENS], tl.int32)
                for table in tl.range(0, TABLES, AT_ONCE):
                    buckets = buckets_of(
                        memory + (kv_head * BLOCK_SIZE + tokens) * (2 * HEAD_SIZE),
                        tokens < end,
                        states + place * states_stride + kv_head * HEAD_SIZE,
                        projections + kv_head * (HEAD_SIZE * TABLES * BITS),
                        table,
                        HEAD_SIZE,
                        TABLES,
                        BITS,
                        BITS_TILE,
                        AT_ONCE,
                        HAS_MEAN,
                    )
                    tables = table + tl.arange(0, AT_ONCE)[None, :]
                    for head in tl.static_range(GROUP):
                        # No bucket is negative.
                        row = tl.load(
                            own + (unit + head) * TABLES + tables, mask=tables < TABLES, other=-1
                        )
                        found = tl.sum((row == buckets).to(tl.int32), axis=1)
                        counts += tl.where(heads == head, found[None, :], 0)
                columns = number * BLOCK_SIZE + tokens
                target = flags + unit * stride
                _sample(target, stride, columns, counts, tokens < end, GROUP, SAMPLED)


def flag_collisions(
    own: torch.Tensor,
    kv_cache: torch.Tensor,
    place: tuple[int, int],
    codes_at: int,
    width: int,
    bits: int,
    projections: torch.Tensor,
    batch: DeviceBatch,
    tags: torch.Tensor,
    states: torch.Tensor,
    has_mean: bool,
    flags: torch.Tensor,
) -> None:
    """Samples the unselected keys that share two buckets or more with a query.

    Keys whose blocks hold no signatures of the query's mean get them here, and they are forgotten:
    sequences that share blocks may want different ones.

    Args:
        own: `[num_queries, num_heads, L]`, int64, contiguous: the queries' signatures.
        kv_cache: See `sign_keys`; so the next six, and `tags` to `has_mean`.
        place: Likewise.
        codes_at: Likewise.
        width: Likewise.
        bits: Likewise.
        projections: Likewise.
        batch: Of the queries, with the places of their means.
        tags: Likewise.
        states: Likewise.
        has_mean: Likewise.
        flags: `[num_queries * num_heads, capacity]`, uint8; written.
    """
    assert batch.places is not None
    num_queries, num_heads, tables = own.shape
    kv_heads, block_size = kv_cache.shape[1:3]
    if num_queries == 0:
        return
    scans, capacity, group = num_queries * kv_heads, flags.shape[1], num_heads // kv_heads
    sequences = (batch.block_table, batch.rows, batch.lengths, batch.places, tags)
    stride = batch.block_table.stride(0)
    shared = {
        "BLOCK_BYTES": block_bytes(kv_cache),
        "OFFSET": place[0],
        "STRIDE": place[1],
        "BLOCK_SIZE": block_size,
        "TABLES": tables,
        "GROUP": group,
        "GROUP_TILE": padded(group),
        "SAMPLED": SAMPLED,
        "enable_fp_fusion": False,
    }
    _flag_collisions[(num_queries, kv_heads, splits_of(scans, -(-capacity // _KEYS)))](
        own,
        kv_cache,
        *sequences,
        flags,
        stride,
        capacity,
        CODES_AT=codes_at,
        BUCKET=STORED[width],
        KEYS=_KEYS,
        **shared,
    )
    tiles = -(-capacity // (block_size * _HEADERS))
    _flag_uncoded[(num_queries, kv_heads, splits_of(scans, tiles))](
        own,
        kv_cache,
        *sequences,
        states,
        projections,
        flags,
        stride,
        states.stride(0),
        capacity,
        HEAD_SIZE=projections.shape[1],
        BITS=bits,
        BITS_TILE=padded(bits),
        AT_ONCE=tables_at_once(tables, bits),
        HAS_MEAN=has_mean,
        BLOCKS=_HEADERS,
        TOKENS=TOKENS,
        **shared,
    )
