"""Labels of keys (Double Sparsity) compared with queries."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_sparse_plugin.paged.triton_kernels.grids import launched
from vllm_sparse_plugin.paged.triton_kernels.pooling import (
    POOLING_TILE,
    PoolingWorkspace,
    weight_of,
)
from vllm_sparse_plugin.paged.triton_kernels.quantization import round_to
from vllm_sparse_plugin.paged.triton_kernels.tiles import block_bytes, splits_of

_MOST_HEADS = 8
"""Of a program; of more, their sums would take too many registers."""


@triton.jit
def _add_products(query, head_stride, labels, sums, HEADS: tl.constexpr):
    """Adds the products of one channel's labels `[TILE]` and each head's query to the head's sums.

    Queries are single numbers, and so keys stay in the threads that have loaded them: a product of
    two axes would move them from thread to thread.
    """
    added = ()
    for head in tl.static_range(HEADS):
        own = tl.load(query + head * head_stride)
        added = added + (tl.fma(labels, own, sums[head]),)  # type: ignore[assignment]  # noqa: RUF005
    return added


@triton.jit
def _store_scores(
    scores,
    peaks,
    masses,
    scores_head_stride,
    sums,
    tile,
    tiles,
    length,
    factor,
    scaling,
    HEADS: tl.constexpr,
    TILE: tl.constexpr,
    IS_WEIGHED: tl.constexpr,
):
    """Stores a tile's scores, and what `pooling` needs to know of them; see `_score_labels`."""
    keys = tile * TILE + tl.arange(0, TILE)
    for head in tl.static_range(HEADS):
        score = sums[head] * factor
        target = scores + head * scores_head_stride + keys
        # A mask that differs between neighbours would make each a store of its own.
        if (tile + 1) * TILE <= length:
            tl.store(target, score)
        else:
            tl.store(target, score, mask=keys < length)
        if IS_WEIGHED:
            logits = tl.where(keys < length, score * scaling, float("-inf"))
            peak, mass = weight_of(logits)
            tl.store(peaks + head * tiles + tile, peak)
            tl.store(masses + head * tiles + tile, mass)


@launched
def _score_labels(
    query,
    cache,
    block_table,
    rows,
    lengths,
    scores,
    peaks,
    masses,
    factor,
    scaling,
    query_stride,
    head_stride,
    table_stride,
    scores_stride,
    scores_head_stride,
    tiles,
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
    ALL_HEADS: tl.constexpr,
    TILE: tl.constexpr,
    IS_WEIGHED: tl.constexpr,
    IS_INTERPRETED: tl.constexpr,
):
    """Grid: queries, groups of `HEADS` query heads that have a row of labels in common, splits."""
    index, group, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    head = group * HEADS
    row = head // (ALL_HEADS // ROWS_PER_HEAD)
    length = tl.load(lengths + index)
    table = block_table + tl.load(rows + index).to(tl.int64) * table_stride
    memory = cache.to(tl.pointer_type(tl.uint8)) + OFFSET
    memory += head // ALL_HEADS * STRIDE + row % ROWS_PER_HEAD * ROW_BYTES
    query += index * query_stride + head * head_stride
    scores += index * scores_stride + head * scores_head_stride
    peaks += (index * tl.num_programs(1) * HEADS + head) * tiles
    masses += (index * tl.num_programs(1) * HEADS + head) * tiles
    for tile in tl.range(split, tl.cdiv(length, TILE), tl.num_programs(2)):
        keys = tile * TILE + tl.arange(0, TILE)
        blocks, tokens = keys // BLOCK_SIZE, keys % BLOCK_SIZE
        # Of whole blocks: a mask that differs between neighbours would make each a load of its own.
        loaded = blocks * BLOCK_SIZE < length
        block = tl.load(table + blocks, mask=loaded, other=0).to(tl.int64)
        records = memory + block * BLOCK_BYTES
        sums = ()
        for _ in tl.static_range(HEADS):
            sums = sums + (tl.zeros([TILE], tl.float32),)  # type: ignore[assignment]  # noqa: RUF005
        if BITS == 16:
            labels = records.to(cache.dtype) + tokens
            for channel in tl.range(COUNT):
                values = tl.load(labels + channel * BLOCK_SIZE, mask=loaded, other=0.0)
                values = values.to(tl.float32)
                sums = _add_products(query + channel, head_stride, values, sums, HEADS)
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
                    values = code.to(tl.float32) * step + low
                    if IS_INTERPRETED:
                        values = round_to(values, cache.dtype.element_ty)
                    else:
                        values = values.to(cache.dtype.element_ty).to(tl.float32)
                    channel = part * PART + byte
                    sums = _add_products(query + channel, head_stride, values, sums, HEADS)
        _store_scores(
            scores,
            peaks,
            masses,
            scores_head_stride,
            sums,
            tile,
            tiles,
            length,
            factor,
            scaling,
            HEADS,
            TILE,
            IS_WEIGHED,
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
    scaling: float = 1.0,
    weights: PoolingWorkspace | None = None,
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
        scaling: Of the scores, for weighing them.
        weights: Written, if there is one: what `pooling.weigh_scores` finds.
    """
    num_queries, num_heads, count = query.shape
    if num_queries == 0:
        return
    if weights is not None:
        weights.check(scores)
    kv_heads, block_size = kv_cache.shape[1:3]
    of_kv_head = num_heads // kv_heads
    of_row = of_kv_head // rows_per_head
    heads = next(size for size in range(min(of_row, _MOST_HEADS), 0, -1) if of_row % size == 0)
    groups = num_heads // heads
    parts = max(1, 8 // bits)
    splits = splits_of(num_queries * groups, -(-scores.shape[2] // POOLING_TILE))
    _score_labels[(num_queries, groups, splits)](
        query,
        kv_cache,
        block_table,
        rows,
        lengths,
        scores,
        scores if weights is None else weights.peaks,
        scores if weights is None else weights.masses,
        float(scale),
        scaling,
        query.stride(0),
        query.stride(1),
        block_table.stride(0),
        scores.stride(0),
        scores.stride(1),
        0 if weights is None else weights.peaks.shape[1],
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
        ALL_HEADS=of_kv_head,
        TILE=POOLING_TILE,
        IS_WEIGHED=weights is not None,
        IS_INTERPRETED=not isinstance(_score_labels, triton.JITFunction),
        enable_fp_fusion=False,
    )
