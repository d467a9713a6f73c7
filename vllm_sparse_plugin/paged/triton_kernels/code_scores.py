"""Codes of keys (PQCache) looked up in the queries' tables."""

from __future__ import annotations

import torch
import triton.language as tl

from vllm_sparse_plugin.paged.triton_kernels.grids import launched
from vllm_sparse_plugin.paged.triton_kernels.tiles import (
    block_bytes,
    padded,
    rows_at_once,
    splits_of,
    store_scores,
)


@launched
def _score_codes(
    tables,
    queries,
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
    task, kv_head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    index = tl.load(queries + task).to(tl.int64)
    length = tl.load(lengths + index, mask=index >= 0, other=0)
    row = tl.load(rows + index, mask=index >= 0, other=0).to(tl.int64)
    blocks = block_table + row * table_stride
    heads = tl.arange(0, GROUP_TILE)[:, None]
    memory = cache.to(tl.pointer_type(tl.uint8)) + OFFSET + kv_head * STRIDE
    entries = tables + (task * tl.num_programs(1) + kv_head) * (PARTS * CENTROIDS * GROUP) + heads
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


def score_codes(
    tables: torch.Tensor,
    queries: torch.Tensor,
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
        queries: `[n]`, int64: whose they are; negative = padding.
        kv_cache: See the package; so the last four.
        place: Of the codes, see the package.
        stored_bits: Of a code: 1, 2, 4 or 8.
        block_table: Of the batch.
        rows: Of all queries.
        lengths: Of all queries.
        scores: A column per key; written for these queries.
    """
    count, heads, parts, num_centroids, group = tables.shape
    if count == 0:
        return
    keys = rows_at_once(4 * padded(group), most=256)
    _score_codes[(count, heads, splits_of(count * heads, -(-scores.shape[2] // keys)))](
        tables,
        queries,
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
