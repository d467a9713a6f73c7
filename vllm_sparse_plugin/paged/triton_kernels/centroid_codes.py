"""Codes of keys by a product quantiser (PQCache); `kernels.centroid_codes` has the codes' form.

A codebook lies in one row of `states`: `[num_kv_heads, M, sub_dim + 1, C]`, float32; of each
sub-space, the channels of its C centroids side by side, and then their squared lengths, which are
infinite where there is no centroid. All sums go through their terms one by one, as those of the
numba kernels do.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_sparse_plugin.paged.triton_kernels.cache_rows import DeviceBatch
from vllm_sparse_plugin.paged.triton_kernels.grids import launched
from vllm_sparse_plugin.paged.triton_kernels.learned_blocks import (
    block_to_encode,
    coded_tokens,
    header_of,
    note_codes,
)
from vllm_sparse_plugin.paged.triton_kernels.tiles import TILE_NUMBERS, block_bytes, padded


@launched
def _encode_keys(
    cache,
    block_table,
    rows,
    lengths,
    places,
    tags,
    states,
    table_stride,
    states_stride,
    BLOCK_BYTES: tl.constexpr,
    OFFSET: tl.constexpr,
    STRIDE: tl.constexpr,
    CODES_AT: tl.constexpr,
    STORED_BITS: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    SUB_DIM: tl.constexpr,
    CENTROIDS: tl.constexpr,
    CENTROIDS_TILE: tl.constexpr,
    TOKENS: tl.constexpr,
    IS_LAST: tl.constexpr,
):
    head, byte = tl.program_id(1), tl.program_id(2)
    sequence, number, end = block_to_encode(lengths, BLOCK_SIZE, IS_LAST)
    if end > 0:
        parts: tl.constexpr = HEAD_SIZE // SUB_DIM
        per_byte: tl.constexpr = 8 // STORED_BITS
        row = tl.load(rows + sequence).to(tl.int64)
        block = tl.load(block_table + row * table_stride + number).to(tl.int64)
        place = tl.load(places + sequence).to(tl.int64)
        header = header_of(cache, block, head, BLOCK_BYTES, OFFSET, STRIDE)
        first = coded_tokens(header, tl.load(tags + place), end > 0)
        book = states + place * states_stride + head * (parts * (SUB_DIM + 1) * CENTROIDS)
        codes = header.to(tl.pointer_type(tl.uint8)) + CODES_AT
        memory = (cache.to(tl.pointer_type(tl.uint8)) + block * BLOCK_BYTES).to(cache.dtype)
        centroids = tl.arange(0, CENTROIDS_TILE)
        for start in tl.range(first, end, TOKENS):
            tokens = start + tl.arange(0, TOKENS)
            present = tokens < end
            keys = memory + (head * BLOCK_SIZE + tokens) * (2 * HEAD_SIZE)
            packed = tl.zeros([TOKENS], tl.int32)
            for part in tl.static_range(per_byte):
                m = byte * per_byte + part
                # The last byte may have fewer codes.
                nearest = nearest_centroids(
                    keys + m * SUB_DIM,
                    tokens < tl.where(m < parts, end, 0),
                    book + m * ((SUB_DIM + 1) * CENTROIDS) + centroids,
                    centroids < tl.where(m < parts, CENTROIDS, 0),
                    SUB_DIM,
                    CENTROIDS,
                )
                packed |= tl.where(m < parts, nearest, 0) << (part * STORED_BITS)
            tl.store(codes + tokens * ROW_BYTES + byte, packed.to(tl.uint8), mask=present)


@triton.jit
def nearest_centroids(keys, mask, book, is_real, SUB_DIM: tl.constexpr, CENTROIDS: tl.constexpr):
    """The codes of one sub-vector of some keys, `[keys]`, int32; the lower one of equal ones.

    Args:
        keys: Pointers to the first channel of each.
        mask: Which of the keys there are.
        book: Pointers to the first channel of each centroid.
        is_real: Which of the centroids there are.
        SUB_DIM: Channels.
        CENTROIDS: C.
    """
    sums = tl.zeros([keys.shape[0], book.shape[0]], tl.float32)
    for k in tl.range(SUB_DIM):
        number = tl.load(keys + k, mask=mask, other=0.0).to(tl.float32)
        channel = tl.load(book + k * CENTROIDS, mask=is_real, other=0.0)
        sums = tl.fma((2.0 * number)[:, None], channel[None, :], sums)
    squares = tl.load(book + SUB_DIM * CENTROIDS, mask=is_real, other=float("inf"))
    # Of |c|^2 - 2 x c.
    return tl.argmin(squares[None, :] - sums, axis=1, tie_break_left=True)


@launched
def _fill_tables(
    query,
    places,
    states,
    tables,
    query_stride,
    head_stride,
    states_stride,
    PARTS: tl.constexpr,
    SUB_DIM: tl.constexpr,
    CENTROIDS: tl.constexpr,
    GROUP: tl.constexpr,
    CENTROIDS_TILE: tl.constexpr,
    GROUP_TILE: tl.constexpr,
):
    index, head, m = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    place = tl.load(places + index).to(tl.int64)
    if place >= 0:
        part = head * PARTS + m
        centroids, heads = tl.arange(0, CENTROIDS_TILE), tl.arange(0, GROUP_TILE)
        book = states + place * states_stride
        book += part * ((SUB_DIM + 1) * CENTROIDS) + centroids
        own = query + index * query_stride + (head * GROUP + heads) * head_stride + m * SUB_DIM
        sums = tl.zeros([CENTROIDS_TILE, GROUP_TILE], tl.float32)
        for k in tl.range(SUB_DIM):
            number = tl.load(own + k, mask=heads < GROUP, other=0.0).to(tl.float32)
            channel = tl.load(book + k * CENTROIDS, mask=centroids < CENTROIDS, other=0.0)
            sums = tl.fma(number[None, :], channel[:, None], sums)
        target = tables + (index * tl.num_programs(1) * PARTS + part) * (CENTROIDS * GROUP)
        target += centroids[:, None] * GROUP + heads[None, :]
        mask = (centroids < CENTROIDS)[:, None] & (heads < GROUP)[None, :]
        tl.store(target, sums, mask=mask)


def encode_keys(
    kv_cache: torch.Tensor,
    place: tuple[int, int],
    codes_at: int,
    stored_bits: int,
    head_size: int,
    sub_dim: int,
    num_centroids: int,
    batch: DeviceBatch,
    tags: torch.Tensor,
    states: torch.Tensor,
    num_blocks: int | None = None,
) -> None:
    """Makes the codes that blocks lack, and says so in their headers.

    Source: PQCache, arXiv:2407.12820.

    Args:
        kv_cache: See the package; so `place`.
        place: Of the index.
        codes_at: From its header to the codes, bytes.
        stored_bits: Of a code: 1, 2, 4 or 8.
        head_size: Channels of a key.
        sub_dim: Channels of a sub-vector.
        num_centroids: C.
        batch: Sequences, with the places of their codebooks: each sees the keys that need codes.
        tags: `[places]`, int64: of the codebooks.
        states: `[places, width]`, float32, the last axis contiguous.
        num_blocks: Of the only sequence; None: each sequence's last block, which nobody shares.
    """
    assert batch.places is not None
    heads, block_size = kv_cache.shape[1:3]
    row_bytes = -(-(head_size // sub_dim) * stored_bits // 8)
    tile = padded(num_centroids)
    programs = len(batch.lengths) if num_blocks is None else num_blocks
    if programs == 0:
        return
    table = batch.block_table
    _encode_keys[(programs, heads, row_bytes)](
        kv_cache,
        table,
        batch.rows,
        batch.lengths,
        batch.places,
        tags,
        states,
        table.stride(0),
        states.stride(0),
        BLOCK_BYTES=block_bytes(kv_cache),
        OFFSET=place[0],
        STRIDE=place[1],
        CODES_AT=codes_at,
        STORED_BITS=stored_bits,
        ROW_BYTES=row_bytes,
        BLOCK_SIZE=block_size,
        HEAD_SIZE=head_size,
        SUB_DIM=sub_dim,
        CENTROIDS=num_centroids,
        CENTROIDS_TILE=tile,
        TOKENS=max(1, min(padded(block_size), TILE_NUMBERS // 2 // tile)),
        IS_LAST=num_blocks is None,
        enable_fp_fusion=False,
    )
    # Afterwards: programs of other bytes of the same codes read the header too.
    note_codes(kv_cache, place, batch, tags, num_blocks)


def fill_tables(
    query: torch.Tensor,
    places: torch.Tensor,
    states: torch.Tensor,
    sub_dim: int,
    tables: torch.Tensor,
) -> None:
    """Dot products of the queries' sub-vectors with all centroids.

    Args:
        query: `[num_queries, num_heads, head_size]`, of any float type; channels side by side.
        places: `[num_queries]`, int32: of their codebooks; negative = padding.
        states: `[places, width]`, float32, the last axis contiguous.
        sub_dim: Channels of a sub-vector.
        tables: `[num_queries, num_kv_heads, M, C, heads of a group]`, float32, contiguous; written.
    """
    count, heads, parts, num_centroids, group = tables.shape
    if count == 0:
        return
    _fill_tables[(count, heads, parts)](
        query,
        places,
        states,
        tables,
        query.stride(0),
        query.stride(1),
        states.stride(0),
        PARTS=parts,
        SUB_DIM=sub_dim,
        CENTROIDS=num_centroids,
        GROUP=group,
        CENTROIDS_TILE=padded(num_centroids),
        GROUP_TILE=padded(group),
        enable_fp_fusion=False,
    )
