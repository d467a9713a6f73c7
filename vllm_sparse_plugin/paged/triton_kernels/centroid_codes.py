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

from vllm_sparse_plugin.paged.triton_kernels.grids import launched
from vllm_sparse_plugin.paged.triton_kernels.tiles import TILE_NUMBERS, block_bytes, padded


@triton.jit
def _coded_tokens(header, tag):
    """How many leading tokens have codes of the state with this tag; see `learned_blocks`."""
    count = tl.load(header)
    return tl.where(tl.load(header + 1) == tag, count, 0)


@triton.jit
def _header_of(
    cache, block, head, BLOCK_BYTES: tl.constexpr, OFFSET: tl.constexpr, STRIDE: tl.constexpr
):
    record = cache.to(tl.pointer_type(tl.uint8)) + block * BLOCK_BYTES + OFFSET + head * STRIDE
    return record.to(tl.pointer_type(tl.int64))


@launched
def _encode_keys(
    cache,
    blocks,
    wanted,
    tags,
    places,
    states,
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
):
    task, head, byte = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    block = tl.load(blocks + task).to(tl.int64)
    if block >= 0:
        parts: tl.constexpr = HEAD_SIZE // SUB_DIM
        per_byte: tl.constexpr = 8 // STORED_BITS
        header = _header_of(cache, block, head, BLOCK_BYTES, OFFSET, STRIDE)
        first = _coded_tokens(header, tl.load(tags + task)).to(tl.int32)
        end = tl.load(wanted + task).to(tl.int32)
        book = states + tl.load(places + task) * states_stride
        book += head * (parts * (SUB_DIM + 1) * CENTROIDS)
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
                own = book + m * ((SUB_DIM + 1) * CENTROIDS) + centroids
                # The last byte may have fewer codes.
                there = tokens < tl.where(m < parts, end, 0)
                real = centroids < tl.where(m < parts, CENTROIDS, 0)
                sums = tl.zeros([TOKENS, CENTROIDS_TILE], tl.float32)
                for k in tl.range(SUB_DIM):
                    number = tl.load(keys + m * SUB_DIM + k, mask=there, other=0.0).to(tl.float32)
                    channel = tl.load(own + k * CENTROIDS, mask=real, other=0.0)
                    sums = tl.fma((2.0 * number)[:, None], channel[None, :], sums)
                squares = tl.load(own + SUB_DIM * CENTROIDS, mask=real, other=float("inf"))
                # Of |c|^2 - 2 x c; the lower one of equal ones.
                nearest = tl.argmin(squares[None, :] - sums, axis=1, tie_break_left=True)
                packed |= tl.where(m < parts, nearest, 0) << (part * STORED_BITS)
            tl.store(codes + tokens * ROW_BYTES + byte, packed.to(tl.uint8), mask=present)


@launched
def _note_codes(
    cache,
    blocks,
    wanted,
    tags,
    BLOCK_BYTES: tl.constexpr,
    OFFSET: tl.constexpr,
    STRIDE: tl.constexpr,
):
    task, head = tl.program_id(0), tl.program_id(1)
    block = tl.load(blocks + task).to(tl.int64)
    if block >= 0:
        header = _header_of(cache, block, head, BLOCK_BYTES, OFFSET, STRIDE)
        tag = tl.load(tags + task)
        count = tl.maximum(_coded_tokens(header, tag), tl.load(wanted + task))
        tl.store(header, count)
        tl.store(header + 1, tag)


@launched
def _fill_tables(
    query,
    queries,
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
    task, head, m = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    index = tl.load(queries + task).to(tl.int64)
    if index >= 0:
        part = head * PARTS + m
        centroids, heads = tl.arange(0, CENTROIDS_TILE), tl.arange(0, GROUP_TILE)
        book = states + tl.load(places + index) * states_stride
        book += part * ((SUB_DIM + 1) * CENTROIDS) + centroids
        own = query + index * query_stride + (head * GROUP + heads) * head_stride + m * SUB_DIM
        sums = tl.zeros([CENTROIDS_TILE, GROUP_TILE], tl.float32)
        for k in tl.range(SUB_DIM):
            number = tl.load(own + k, mask=heads < GROUP, other=0.0).to(tl.float32)
            channel = tl.load(book + k * CENTROIDS, mask=centroids < CENTROIDS, other=0.0)
            sums = tl.fma(number[None, :], channel[:, None], sums)
        target = tables + (task * tl.num_programs(1) * PARTS + part) * (CENTROIDS * GROUP)
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
    blocks: torch.Tensor,
    wanted: torch.Tensor,
    tags: torch.Tensor,
    places: torch.Tensor,
    states: torch.Tensor,
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
        blocks: `[n]`, int64, each once; negative = padding.
        wanted: `[n]`, int64: tokens that need codes.
        tags: `[n]`, int64: of the codebook.
        places: `[n]`, int64: of the codebook in `states`.
        states: `[places, width]`, float32, the last axis contiguous.
    """
    if blocks.shape[0] == 0:
        return
    heads, block_size = kv_cache.shape[1:3]
    row_bytes = -(-(head_size // sub_dim) * stored_bits // 8)
    tile = padded(num_centroids)
    where = {"BLOCK_BYTES": block_bytes(kv_cache), "OFFSET": place[0], "STRIDE": place[1]}
    _encode_keys[(blocks.shape[0], heads, row_bytes)](
        kv_cache,
        blocks,
        wanted,
        tags,
        places,
        states,
        states.stride(0),
        **where,
        CODES_AT=codes_at,
        STORED_BITS=stored_bits,
        ROW_BYTES=row_bytes,
        BLOCK_SIZE=block_size,
        HEAD_SIZE=head_size,
        SUB_DIM=sub_dim,
        CENTROIDS=num_centroids,
        CENTROIDS_TILE=tile,
        TOKENS=max(1, min(padded(block_size), TILE_NUMBERS // 2 // tile)),
        enable_fp_fusion=False,
    )
    # Afterwards: programs of other bytes of the same codes read the header too.
    _note_codes[(blocks.shape[0], heads)](
        kv_cache, blocks, wanted, tags, **where, num_warps=1, enable_fp_fusion=False
    )


def fill_tables(
    query: torch.Tensor,
    queries: torch.Tensor,
    places: torch.Tensor,
    states: torch.Tensor,
    sub_dim: int,
    tables: torch.Tensor,
) -> None:
    """Dot products of the queries' sub-vectors with all centroids.

    Args:
        query: `[num_queries, num_heads, head_size]`, of any float type; channels side by side.
        queries: `[n]`, int64: which of them; negative = padding.
        places: `[num_queries]`, int64: of their codebooks.
        states: `[places, width]`, float32, the last axis contiguous.
        sub_dim: Channels of a sub-vector.
        tables: `[n, num_kv_heads, M, C, heads of a group]`, float32, contiguous; written.
    """
    count, heads, parts, num_centroids, group = tables.shape
    if count == 0:
        return
    _fill_tables[(count, heads, parts)](
        query,
        queries,
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
