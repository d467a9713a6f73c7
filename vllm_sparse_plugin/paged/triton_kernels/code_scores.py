"""Codes of keys (PQCache) looked up in the queries' tables."""

from __future__ import annotations

import torch
import triton.language as tl

from vllm_sparse_plugin.paged.triton_kernels.cache_rows import DeviceBatch
from vllm_sparse_plugin.paged.triton_kernels.centroid_codes import nearest_centroids
from vllm_sparse_plugin.paged.triton_kernels.grids import launched
from vllm_sparse_plugin.paged.triton_kernels.learned_blocks import (
    span_without_codes,
    tokens_without_codes,
)
from vllm_sparse_plugin.paged.triton_kernels.tiles import (
    TILE_NUMBERS,
    block_bytes,
    padded,
    rows_at_once,
    splits_of,
    store_scores,
)

_HEADERS = 64
"""Of blocks, looked at together."""


@launched
def _score_codes(
    tables,
    cache,
    block_table,
    rows,
    lengths,
    scores,
    table_stride,
    scores_stride,
    scores_head_stride,
    BLOCK_BYTES: tl.constexpr,
    OFFSET: tl.constexpr,
    STRIDE: tl.constexpr,
    STORED_BITS: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PARTS: tl.constexpr,
    CENTROIDS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_TILE: tl.constexpr,
    KEYS: tl.constexpr,
):
    index, kv_head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + index)
    row = tl.load(rows + index).to(tl.int64)
    blocks = block_table + row * table_stride
    heads = tl.arange(0, GROUP_TILE)[:, None]
    memory = cache.to(tl.pointer_type(tl.uint8)) + OFFSET + kv_head * STRIDE
    entries = tables + (index * tl.num_programs(1) + kv_head) * (PARTS * CENTROIDS * GROUP) + heads
    scores += index * scores_stride + kv_head * GROUP * scores_head_stride
    for tile in tl.range(split, tl.cdiv(length, KEYS), tl.num_programs(2)):
        places = tile * KEYS + tl.arange(0, KEYS)
        present = places < length
        block = tl.load(blocks + places // BLOCK_SIZE, mask=present, other=0).to(tl.int64)
        codes = memory + block * BLOCK_BYTES + places % BLOCK_SIZE * ROW_BYTES
        mask = present[None, :] & (heads < GROUP)
        sums = tl.zeros([GROUP_TILE, KEYS], tl.float32)
        for m in tl.range(PARTS):
            byte = tl.load(codes + m * STORED_BITS // 8, mask=present, other=0).to(tl.int32)
            code = (byte >> (m * STORED_BITS % 8)) & ((1 << STORED_BITS) - 1)
            entry = (m * CENTROIDS + code) * GROUP
            sums += tl.load(entries + entry[None, :], mask=mask, other=0.0)
        store_scores(scores, scores_head_stride, tile * KEYS, length, sums, GROUP)


@launched
def _score_uncoded(
    tables,
    cache,
    block_table,
    rows,
    lengths,
    places,
    tags,
    states,
    scores,
    table_stride,
    states_stride,
    scores_stride,
    scores_head_stride,
    BLOCK_BYTES: tl.constexpr,
    OFFSET: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    PARTS: tl.constexpr,
    CENTROIDS: tl.constexpr,
    CENTROIDS_TILE: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_TILE: tl.constexpr,
    BLOCKS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    index, kv_head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + index)
    sub_dim: tl.constexpr = HEAD_SIZE // PARTS
    blocks = block_table + tl.load(rows + index).to(tl.int64) * table_stride
    place = tl.load(places + index).to(tl.int64)
    tag = tl.load(tags + place)
    heads, centroids = tl.arange(0, GROUP_TILE)[:, None], tl.arange(0, CENTROIDS_TILE)
    entries = tables + (index * tl.num_programs(1) + kv_head) * (PARTS * CENTROIDS * GROUP) + heads
    books = states + place * states_stride + kv_head * (PARTS * (sub_dim + 1) * CENTROIDS)
    scores += index * scores_stride + kv_head * GROUP * scores_head_stride
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
                present = tokens < end
                keys = memory + (kv_head * BLOCK_SIZE + tokens) * (2 * HEAD_SIZE)
                sums = tl.zeros([GROUP_TILE, TOKENS], tl.float32)
                for m in tl.range(PARTS):
                    code = nearest_centroids(
                        keys + m * sub_dim,
                        present,
                        books + m * ((sub_dim + 1) * CENTROIDS) + centroids,
                        centroids < CENTROIDS,
                        sub_dim,
                        CENTROIDS,
                    )
                    entry = (m * CENTROIDS + code) * GROUP
                    mask = present[None, :] & (heads < GROUP)
                    sums += tl.load(entries + entry[None, :], mask=mask, other=0.0)
                offset = number * BLOCK_SIZE
                limit = offset + end
                store_scores(scores, scores_head_stride, offset + start, limit, sums, GROUP)


def score_codes(
    tables: torch.Tensor,
    kv_cache: torch.Tensor,
    place: tuple[int, int],
    stored_bits: int,
    block_table: torch.Tensor,
    rows: torch.Tensor,
    lengths: torch.Tensor,
    scores: torch.Tensor,
) -> None:
    """Sums of the table entries of each key's codes, for every key that a query sees.

    Sums go through the sub-spaces one by one, as those of the numba kernel do.

    Args:
        tables: See `centroid_codes.fill_tables`.
        kv_cache: See the package; so the next one, and the last four.
        place: Of the codes, see the package.
        stored_bits: Of a code: 1, 2, 4 or 8.
        block_table: Of the batch.
        rows: Likewise.
        lengths: Likewise.
        scores: A column per key; written.
    """
    count, heads, parts, num_centroids, group = tables.shape
    if count == 0:
        return
    keys = rows_at_once(4 * padded(group), most=256)
    _score_codes[(count, heads, splits_of(count * heads, -(-scores.shape[2] // keys)))](
        tables,
        kv_cache,
        block_table,
        rows,
        lengths,
        scores,
        block_table.stride(0),
        scores.stride(0),
        scores.stride(1),
        BLOCK_BYTES=block_bytes(kv_cache),
        OFFSET=place[0],
        STRIDE=place[1],
        STORED_BITS=stored_bits,
        ROW_BYTES=-(-parts * stored_bits // 8),
        BLOCK_SIZE=kv_cache.shape[2],
        PARTS=parts,
        CENTROIDS=num_centroids,
        GROUP=group,
        GROUP_TILE=padded(group),
        KEYS=keys,
        enable_fp_fusion=False,
    )


def score_uncoded(
    tables: torch.Tensor,
    kv_cache: torch.Tensor,
    place: tuple[int, int],
    head_size: int,
    batch: DeviceBatch,
    tags: torch.Tensor,
    states: torch.Tensor,
    scores: torch.Tensor,
) -> None:
    """The scores of keys whose blocks hold no codes of the query's codebook, from the keys.

    Sequences that share blocks may want different codes of them: these have one's, the others'
    are made here, and forgotten.

    Args:
        tables: See `centroid_codes.fill_tables`.
        kv_cache: See the package; so the next one.
        place: Of the index.
        head_size: Channels of a key.
        batch: Of the queries, with the places of their codebooks.
        tags: `[places]`, int64.
        states: `[places, width]`, float32.
        scores: A column per key; written for such keys.
    """
    assert batch.places is not None
    count, heads, parts, num_centroids, group = tables.shape
    if count == 0:
        return
    block_size, tile = kv_cache.shape[2], padded(num_centroids)
    tiles = -(-scores.shape[2] // (block_size * _HEADERS))
    _score_uncoded[(count, heads, splits_of(count * heads, tiles))](
        tables,
        kv_cache,
        batch.block_table,
        batch.rows,
        batch.lengths,
        batch.places,
        tags,
        states,
        scores,
        batch.block_table.stride(0),
        states.stride(0),
        scores.stride(0),
        scores.stride(1),
        BLOCK_BYTES=block_bytes(kv_cache),
        OFFSET=place[0],
        STRIDE=place[1],
        BLOCK_SIZE=block_size,
        HEAD_SIZE=head_size,
        PARTS=parts,
        CENTROIDS=num_centroids,
        CENTROIDS_TILE=tile,
        GROUP=group,
        GROUP_TILE=padded(group),
        BLOCKS=_HEADERS,
        TOKENS=max(1, min(padded(block_size), TILE_NUMBERS // 2 // tile)),
        enable_fp_fusion=False,
    )
