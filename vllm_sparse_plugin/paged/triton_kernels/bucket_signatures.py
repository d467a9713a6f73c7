"""Signatures of keys and queries (MagicPIG); `kernels.bucket_signatures` has their form.

Sums go through the channels one by one, as those of the numba kernels do.
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

STORED = {1: tl.uint8, 2: tl.uint16, 4: tl.uint32, 8: tl.uint64}
"""Types of a stored bucket, by bytes."""
TOKENS = 16
"""Of a tile."""


def tables_at_once(tables: int, bits: int) -> int:
    """Hash tables of a tile of `TOKENS` signatures, a power of 2.

    Args:
        tables: L.
        bits: Of a table, K.
    """
    return min(padded(tables), max(1, TILE_NUMBERS // 2 // (TOKENS * padded(bits))))


@triton.jit
def buckets_of(
    vectors,
    mask,
    mean,
    projections,
    first,
    HEAD_SIZE: tl.constexpr,
    TABLES: tl.constexpr,
    BITS: tl.constexpr,
    BITS_TILE: tl.constexpr,
    AT_ONCE: tl.constexpr,
    HAS_MEAN: tl.constexpr,
):
    """The buckets of some vectors in some tables, `[vectors, AT_ONCE]`, int64.

    Args:
        vectors: Pointers to the first channel of each.
        mask: Which of them there are.
        mean: Pointer to what is subtracted, float32.
        projections: Pointer to those of the KV head, `[HEAD_SIZE, TABLES * BITS]`, float32.
        first: The first table.
        HEAD_SIZE: Channels.
        TABLES: L.
        BITS: Of a table, K.
        BITS_TILE: The same as an axis.
        AT_ONCE: Tables.
        HAS_MEAN: Whether anything is subtracted.
    """
    tables = first + tl.arange(0, AT_ONCE)[:, None]
    bit = tl.arange(0, BITS_TILE)[None, :]
    inside = (tables < TABLES) & (bit < BITS)
    columns = projections + tables * BITS + bit
    sums = tl.zeros([vectors.shape[0], AT_ONCE, BITS_TILE], tl.float32)
    for k in tl.range(HEAD_SIZE):
        number = tl.load(vectors + k, mask=mask, other=0.0).to(tl.float32)
        if HAS_MEAN:
            number -= tl.load(mean + k)
        column = tl.load(columns + k * (TABLES * BITS), mask=inside, other=0.0)
        sums = tl.fma(number[:, None, None], column[None, :, :], sums)
    # The first projection's sign is the highest bit.
    places = tl.where(bit < BITS, BITS - 1 - bit, 0).to(tl.int64)
    signs = tl.where(inside[None, :, :], sums, -1.0) >= 0
    return tl.sum(signs.to(tl.int64) << places[None, :, :], axis=2)


@launched
def _sign_keys(
    cache,
    block_table,
    rows,
    lengths,
    places,
    tags,
    states,
    projections,
    table_stride,
    states_stride,
    BLOCK_BYTES: tl.constexpr,
    OFFSET: tl.constexpr,
    STRIDE: tl.constexpr,
    CODES_AT: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    TABLES: tl.constexpr,
    BITS: tl.constexpr,
    BITS_TILE: tl.constexpr,
    AT_ONCE: tl.constexpr,
    HAS_MEAN: tl.constexpr,
    BUCKET: tl.constexpr,
    TOKENS: tl.constexpr,
    IS_LAST: tl.constexpr,
):
    head = tl.program_id(1)
    sequence, number, end = block_to_encode(lengths, BLOCK_SIZE, IS_LAST)
    if end > 0:
        row = tl.load(rows + sequence).to(tl.int64)
        block = tl.load(block_table + row * table_stride + number).to(tl.int64)
        place = tl.load(places + sequence).to(tl.int64)
        header = header_of(cache, block, head, BLOCK_BYTES, OFFSET, STRIDE)
        begin = coded_tokens(header, tl.load(tags + place), end > 0)
        codes = (header.to(tl.pointer_type(tl.uint8)) + CODES_AT).to(tl.pointer_type(BUCKET))
        memory = (cache.to(tl.pointer_type(tl.uint8)) + block * BLOCK_BYTES).to(cache.dtype)
        first = tl.program_id(2) * AT_ONCE
        tables = first + tl.arange(0, AT_ONCE)[None, :]
        for start in tl.range(begin, end, TOKENS):
            tokens = start + tl.arange(0, TOKENS)
            present = tokens < end
            buckets = buckets_of(
                memory + (head * BLOCK_SIZE + tokens) * (2 * HEAD_SIZE),
                present,
                states + place * states_stride + head * HEAD_SIZE,
                projections + head * (HEAD_SIZE * TABLES * BITS),
                first,
                HEAD_SIZE,
                TABLES,
                BITS,
                BITS_TILE,
                AT_ONCE,
                HAS_MEAN,
            )
            target = codes + tables * BLOCK_SIZE + tokens[:, None]
            tl.store(target, buckets.to(BUCKET), mask=present[:, None] & (tables < TABLES))


@launched
def _sign_queries(
    query,
    projections,
    signatures,
    query_stride,
    num_heads,
    GROUP: tl.constexpr,
    GROUP_TILE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    TABLES: tl.constexpr,
    BITS: tl.constexpr,
    BITS_TILE: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    index, kv_head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    heads = tl.arange(0, GROUP_TILE)
    first = tl.program_id(2) * AT_ONCE
    buckets = buckets_of(
        query + index * query_stride + (kv_head * GROUP + heads) * HEAD_SIZE,
        heads < GROUP,
        projections,
        projections + kv_head * (HEAD_SIZE * TABLES * BITS),
        first,
        HEAD_SIZE,
        TABLES,
        BITS,
        BITS_TILE,
        AT_ONCE,
        False,
    )
    tables = first + tl.arange(0, AT_ONCE)[None, :]
    row = index * num_heads + kv_head * GROUP + heads[:, None]
    mask = (heads < GROUP)[:, None] & (tables < TABLES)
    tl.store(signatures + row * TABLES + tables, buckets, mask=mask)


def sign_keys(
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
    num_blocks: int | None = None,
) -> None:
    """Makes the signatures that blocks lack, and says so in their headers.

    Source: MagicPIG, arXiv:2410.16179.

    Args:
        kv_cache: See the package; so `place`.
        place: Of the index.
        codes_at: From its header to the signatures, bytes.
        width: Bytes of a stored bucket.
        bits: Of a table, K.
        projections: `[num_kv_heads, head_size, L * K]`, float32, contiguous.
        batch: Sequences, with the places of their means: each sees the keys that need signatures.
        tags: `[places]`, int64: of the means.
        states: `[places, num_kv_heads * head_size]`, float32: the means.
        has_mean: Whether they are subtracted.
        num_blocks: Of the only sequence; None: each sequence's last block, which nobody shares.
    """
    assert batch.places is not None
    heads, head_size, columns = projections.shape
    tables, block_size = columns // bits, kv_cache.shape[2]
    programs = len(batch.lengths) if num_blocks is None else num_blocks
    if programs == 0:
        return
    at_once = tables_at_once(tables, bits)
    _sign_keys[(programs, heads, -(-tables // at_once))](
        kv_cache,
        batch.block_table,
        batch.rows,
        batch.lengths,
        batch.places,
        tags,
        states,
        projections,
        batch.block_table.stride(0),
        states.stride(0),
        BLOCK_BYTES=block_bytes(kv_cache),
        OFFSET=place[0],
        STRIDE=place[1],
        CODES_AT=codes_at,
        BLOCK_SIZE=block_size,
        HEAD_SIZE=head_size,
        TABLES=tables,
        BITS=bits,
        BITS_TILE=padded(bits),
        AT_ONCE=at_once,
        HAS_MEAN=has_mean,
        BUCKET=STORED[width],
        TOKENS=TOKENS,
        IS_LAST=num_blocks is None,
        enable_fp_fusion=False,
    )
    # Afterwards: programs of other tables of the same block read the header too.
    note_codes(kv_cache, place, batch, tags, num_blocks)


def sign_queries(
    query: torch.Tensor, projections: torch.Tensor, bits: int, signatures: torch.Tensor
) -> None:
    """The queries' signatures.

    Args:
        query: `[num_queries, num_heads, head_size]`, the heads of a query side by side.
        projections: See `sign_keys`.
        bits: Likewise.
        signatures: `[num_queries, num_heads, L]`, int64, contiguous; written.
    """
    num_queries, num_heads, tables = signatures.shape
    kv_heads, head_size, _ = projections.shape
    if num_queries == 0:
        return
    group = num_heads // kv_heads
    at_once = tables_at_once(tables, bits)
    _sign_queries[(num_queries, kv_heads, -(-tables // at_once))](
        query,
        projections,
        signatures,
        query.stride(0),
        num_heads,
        GROUP=group,
        GROUP_TILE=padded(group),
        HEAD_SIZE=head_size,
        TABLES=tables,
        BITS=bits,
        BITS_TILE=padded(bits),
        AT_ONCE=at_once,
        enable_fp_fusion=False,
    )
