"""Bit signatures of keys (HashAttention) compared with those of queries, by XOR."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_sparse_plugin.paged.triton_kernels.grids import launched
from vllm_sparse_plugin.paged.triton_kernels.tiles import (
    block_bytes,
    load_token_blocks,
    padded,
    rows_at_once,
    splits_of,
    store_block_scores,
)


@triton.jit
def _count_bits(words):
    """Set bits of uint32s. Triton has no name for the instruction that the interpreter knows too.

    It would not matter much: a score of 4 bytes is written for each count.
    """
    words = words - ((words >> 1) & 0x55555555)
    words = (words & 0x33333333) + ((words >> 2) & 0x33333333)
    words = (words + (words >> 4)) & 0x0F0F0F0F
    return ((words * 0x01010101) >> 24).to(tl.int32)


@launched
def _score_signatures(
    own,
    cache,
    block_table,
    rows,
    lengths,
    scores,
    own_stride,
    own_head_stride,
    table_stride,
    scores_stride,
    scores_head_stride,
    BLOCK_BYTES: tl.constexpr,
    OFFSET: tl.constexpr,
    STRIDE: tl.constexpr,
    ROWS_PER_HEAD: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BITS: tl.constexpr,
    HEADS: tl.constexpr,
    HEADS_TILE: tl.constexpr,
    BLOCKS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    index, kv_head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + index)
    table = block_table + tl.load(rows + index).to(tl.int64) * table_stride
    memory = cache.to(tl.pointer_type(tl.uint8)) + OFFSET + kv_head * STRIDE
    tokens = tl.arange(0, TOKENS)[None, :]
    heads = tl.arange(0, HEADS_TILE)
    for tile in tl.range(split, tl.cdiv(length, BLOCKS * BLOCK_SIZE), tl.num_programs(2)):
        blocks, loaded = load_token_blocks(table, tile * BLOCKS, length, BLOCKS, BLOCK_SIZE, TOKENS)
        records = (memory + blocks * BLOCK_BYTES).to(tl.pointer_type(tl.uint32)) + tokens
        for row in tl.range(ROWS_PER_HEAD):
            head = (kv_head * ROWS_PER_HEAD + row) * HEADS
            query = own + index * own_stride + (head + heads) * own_head_stride
            differing = tl.zeros([HEADS_TILE, BLOCKS, TOKENS], tl.int32)
            for word in tl.range(WORDS):
                stored = records + (row * WORDS + word) * BLOCK_SIZE
                keys = tl.load(stored, mask=loaded, other=0)
                words = tl.load(query + word, mask=heads < HEADS, other=0)
                words = words.to(tl.uint32, bitcast=True)
                differing += _count_bits(keys[None, :, :] ^ words[:, None, None])
            sums = (BITS - 2 * differing).to(tl.float32)
            target = scores + index * scores_stride + head * scores_head_stride
            store_block_scores(
                target, scores_head_stride, tile * BLOCKS, length, sums, HEADS, BLOCK_SIZE
            )


def score_signatures(
    own: torch.Tensor,
    bits: int,
    kv_cache: torch.Tensor,
    place: tuple[int, int],
    rows_per_head: int,
    block_table: torch.Tensor,
    rows: torch.Tensor,
    lengths: torch.Tensor,
    scores: torch.Tensor,
) -> None:
    """`bits - 2 * (bits that differ)` of each query with every key that it sees.

    Args:
        own: `[num_queries, num_heads, words]`, int32: the queries' signatures.
        bits: Of a signature.
        kv_cache: See the package; so `place` and the last four.
        place: Of the index.
        rows_per_head: Rows of signatures per KV head: one, or one per query head.
        block_table: Of the batch.
        rows: Of the queries.
        lengths: Of the queries.
        scores: A column per key; written.
    """
    num_queries, num_heads, words = own.shape
    if num_queries == 0:
        return
    kv_heads, block_size = kv_cache.shape[1:3]
    heads = num_heads // kv_heads // rows_per_head
    tokens = padded(block_size)
    blocks = rows_at_once(2 * padded(heads), tokens, most=max(1, 1024 // tokens))
    splits = splits_of(num_queries * kv_heads, -(-scores.shape[2] // (blocks * block_size)))
    _score_signatures[(num_queries, kv_heads, splits)](
        own,
        kv_cache,
        block_table,
        rows,
        lengths,
        scores,
        own.stride(0),
        own.stride(1),
        block_table.stride(0),
        scores.stride(0),
        scores.stride(1),
        BLOCK_BYTES=block_bytes(kv_cache),
        OFFSET=place[0],
        STRIDE=place[1],
        ROWS_PER_HEAD=rows_per_head,
        WORDS=words,
        BLOCK_SIZE=block_size,
        BITS=bits,
        HEADS=heads,
        HEADS_TILE=padded(heads),
        BLOCKS=blocks,
        TOKENS=tokens,
        enable_fp_fusion=False,
    )
