"""Labels of keys (Double Sparsity) compared with queries."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_sparse_plugin.paged.triton_kernels.grids import launched
from vllm_sparse_plugin.paged.triton_kernels.quantization import round_to
from vllm_sparse_plugin.paged.triton_kernels.tiles import (
    block_bytes,
    load_token_blocks,
    padded,
    rows_at_once,
    splits_of,
    store_block_scores,
)


@triton.jit
def _add_channel(query, head_stride, channel, values, sums, HEADS: tl.constexpr):
    """Adds one channel's products to `[heads, blocks, tokens]` of sums."""
    heads = tl.arange(0, sums.shape[0])
    own = tl.load(query + heads * head_stride + channel, mask=heads < HEADS, other=0.0)
    return tl.fma(own[:, None, None], values[None, :, :], sums)


@launched
def _score_labels(
    query,
    cache,
    block_table,
    rows,
    lengths,
    scores,
    factor,
    query_stride,
    head_stride,
    table_stride,
    scores_stride,
    scores_head_stride,
    BLOCK_BYTES: tl.constexpr,
    OFFSET: tl.constexpr,
    STRIDE: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    ROWS_PER_HEAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BITS: tl.constexpr,
    COUNT: tl.constexpr,
    PARTS: tl.constexpr,
    PART: tl.constexpr,
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
    for tile in tl.range(split, tl.cdiv(length, BLOCKS * BLOCK_SIZE), tl.num_programs(2)):
        blocks, loaded = load_token_blocks(table, tile * BLOCKS, length, BLOCKS, BLOCK_SIZE, TOKENS)
        for row in tl.range(ROWS_PER_HEAD):
            head = (kv_head * ROWS_PER_HEAD + row) * HEADS
            own = query + index * query_stride + head * head_stride
            records = memory + blocks * BLOCK_BYTES + row * ROW_BYTES
            sums = tl.zeros([HEADS_TILE, BLOCKS, TOKENS], tl.float32)
            if BITS == 16:
                labels = records.to(cache.dtype) + tokens
                for channel in tl.range(COUNT):
                    values = tl.load(labels + channel * BLOCK_SIZE, mask=loaded, other=0.0)
                    values = values.to(tl.float32)
                    sums = _add_channel(own, head_stride, channel, values, sums, HEADS)
            else:
                scales = records.to(tl.pointer_type(tl.float32)) + tokens
                low = tl.load(scales, mask=loaded, other=0.0)
                step = tl.load(scales + BLOCK_SIZE, mask=loaded, other=0.0)
                codes = records + 8 * BLOCK_SIZE + tokens
                # Channel by channel, as on the CPU; a byte comes once for each of its parts.
                for part in tl.static_range(PARTS):
                    for byte in tl.range(min(PART, COUNT - part * PART)):
                        packed = tl.load(codes + byte * BLOCK_SIZE, mask=loaded, other=0)
                        code = (packed >> (part * BITS)) & ((1 << BITS) - 1)
                        # In two steps, and rounded, as `pseudo_quantize` does.
                        values = round_to(code.to(tl.float32) * step + low, cache.dtype.element_ty)
                        channel = part * PART + byte
                        sums = _add_channel(own, head_stride, channel, values, sums, HEADS)
            target = scores + index * scores_stride + head * scores_head_stride
            store_block_scores(
                target, scores_head_stride, tile * BLOCKS, length, sums * factor, HEADS, BLOCK_SIZE
            )


def score_labels(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    place: tuple[int, int],
    row_bytes: int,
    bits: int,
    rows_per_head: int,
    block_table: torch.Tensor,
    rows: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
    scores: torch.Tensor,
) -> None:
    """Dot products of the queries' kept channels with the labels of every key that they see.

    Sums go through the channels one by one, as those of the numba kernel do.

    Args:
        query: `[num_queries, num_heads, C]`, float32: the channels of each head's row of labels;
            see `label_queries`.
        kv_cache: See the package; so `place` and `block_table`, `rows`, `lengths`.
        place: Of the index.
        row_bytes: Of one row of labels.
        bits: Of a code: 2, 4, 8 or 16.
        rows_per_head: Rows of labels per KV head: one, or one per query head.
        block_table: Of the batch.
        rows: Of the queries.
        lengths: Of the queries.
        scale: Of the products.
        scores: A column per key; written.
    """
    num_queries, num_heads, count = query.shape
    if num_queries == 0:
        return
    kv_heads, block_size = kv_cache.shape[1:3]
    heads = num_heads // kv_heads // rows_per_head
    parts = max(1, 8 // bits)
    tokens = padded(block_size)
    blocks = rows_at_once(2 * padded(heads), tokens, most=max(1, 1024 // tokens))
    splits = splits_of(num_queries * kv_heads, -(-scores.shape[2] // (blocks * block_size)))
    _score_labels[(num_queries, kv_heads, splits)](
        query,
        kv_cache,
        block_table,
        rows,
        lengths,
        scores,
        float(scale),
        query.stride(0),
        query.stride(1),
        block_table.stride(0),
        scores.stride(0),
        scores.stride(1),
        BLOCK_BYTES=block_bytes(kv_cache),
        OFFSET=place[0],
        STRIDE=place[1],
        ROW_BYTES=row_bytes,
        ROWS_PER_HEAD=rows_per_head,
        BLOCK_SIZE=block_size,
        BITS=bits,
        COUNT=count,
        PARTS=parts,
        PART=-(-count // parts),
        HEADS=heads,
        HEADS_TILE=padded(heads),
        BLOCKS=blocks,
        TOKENS=tokens,
        enable_fp_fusion=False,
    )
