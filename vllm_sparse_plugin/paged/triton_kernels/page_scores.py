"""Bounds of pages (Quest) compared with queries."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_sparse_plugin.paged.triton_kernels.grids import launched
from vllm_sparse_plugin.paged.triton_kernels.page_bounds import (
    KEYS_AT_ONCE,
    bounds_of_keys,
    parts_of,
)
from vllm_sparse_plugin.paged.triton_kernels.quantization import codes_of, smallest_and_step
from vllm_sparse_plugin.paged.triton_kernels.tiles import (
    block_bytes,
    load_queries,
    padded,
    rows_at_once,
    splits_of,
    store_scores,
)


@triton.jit
def _largest_products(query, low, high, products):
    """Adds products to `[heads, pages, columns]` of them: of positive queries with `high`.

    Others are multiplied with `low`: the maximum of the two products, where `low` is the lower one.

    Args:
        query: `[heads, columns]`, float32.
        low: `[pages, columns]`, float32.
        high: Likewise.
        products: Of other channels.
    """
    products = tl.fma(tl.maximum(query, 0.0)[:, None, :], high[None, :, :], products)
    return tl.fma(tl.minimum(query, 0.0)[:, None, :], low[None, :, :], products)


@triton.jit
def _row_values(packed, scales, SIDE: tl.constexpr, SHIFT: tl.constexpr, BITS: tl.constexpr, mask):
    """One part of some pages' lows or highs, `[pages, columns]`, from its codes."""
    least = tl.load(scales + 2 * SIDE, mask=mask, other=0.0)[:, None]
    step = tl.load(scales + 2 * SIDE + 1, mask=mask, other=0.0)[:, None]
    codes = (packed >> SHIFT) & ((1 << BITS) - 1)
    # In two steps, as `pseudo_quantize` does.
    return codes.to(tl.float32) * step + least


@launched
def _score_pages(
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
    BLOCK_BYTES: tl.constexpr,
    OFFSET: tl.constexpr,
    STRIDE: tl.constexpr,
    RECORD_BYTES: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BITS: tl.constexpr,
    PARTS: tl.constexpr,
    PART: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_TILE: tl.constexpr,
    PAGES: tl.constexpr,
    COLUMNS: tl.constexpr,
    KEYS: tl.constexpr,
):
    index, kv_head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + index)
    whole = length // PAGE_SIZE
    tiles = tl.cdiv(whole, PAGES)
    per_block: tl.constexpr = BLOCK_SIZE // PAGE_SIZE
    blocks = block_table + tl.load(rows + index).to(tl.int64) * table_stride
    memory = cache.to(tl.pointer_type(tl.uint8))
    query += index * query_stride + kv_head * GROUP * head_stride
    scores += index * scores_stride + kv_head * GROUP * scores_head_stride
    columns = tl.arange(0, COLUMNS)
    inside = columns < PART
    for tile in tl.range(split, tiles, tl.num_programs(2)):
        pages = tile * PAGES + tl.arange(0, PAGES)
        present = pages < whole
        block = tl.load(blocks + pages // per_block, mask=present, other=0).to(tl.int64)
        start = block * BLOCK_BYTES + pages % per_block * RECORD_BYTES
        records = memory + OFFSET + kv_head * STRIDE + start
        mask = present[:, None] & inside[None, :]
        products = tl.zeros([GROUP_TILE, PAGES, COLUMNS], tl.float32)
        if BITS == 16:
            rows_of = records.to(cache.dtype)[:, None] + columns[None, :]
            low = tl.load(rows_of, mask=mask, other=0.0).to(tl.float32)
            high = tl.load(rows_of + HEAD_SIZE, mask=mask, other=0.0).to(tl.float32)
            own = load_queries(query, head_stride, columns, inside, GROUP, GROUP_TILE)
            products = _largest_products(own, low, high, products)
        else:
            codes = records[:, None] + 16 + columns[None, :]
            lows = tl.load(codes, mask=mask, other=0)
            highs = tl.load(codes + PART, mask=mask, other=0)
            scales = records.to(tl.pointer_type(tl.float32))
            for part in tl.static_range(PARTS):
                low = _row_values(lows, scales, 0, part * BITS, BITS, present)
                high = _row_values(highs, scales, 1, part * BITS, BITS, present)
                channels = part * PART + columns
                own = load_queries(query, head_stride, channels, inside, GROUP, GROUP_TILE)
                products = _largest_products(own, low, high, products)
        sums = tl.sum(products, axis=2)
        store_scores(scores, scores_head_stride, tile * PAGES, whole, sums, GROUP)
    rest = length - whole * PAGE_SIZE
    if (rest > 0) & (split == tiles % tl.num_programs(2)):
        # The last page has the bounds of the keys that this query sees: they are made from those.
        block = tl.load(blocks + whole // per_block).to(tl.int64)
        keys = (memory + block * BLOCK_BYTES).to(cache.dtype)
        keys += (kv_head * BLOCK_SIZE + whole % per_block * PAGE_SIZE) * (2 * HEAD_SIZE)
        low, high = bounds_of_keys(keys, rest, HEAD_SIZE, PARTS, PART, KEYS, COLUMNS)
        low, high = low[None, :, :], high[None, :, :]
        part = inside[None, None, :]
        if BITS < 16:
            least, step = smallest_and_step(low, part, BITS)
            low = codes_of(low, least, step, BITS) * step + least
            least, step = smallest_and_step(high, part, BITS)
            high = codes_of(high, least, step, BITS) * step + least
        heads = tl.arange(0, GROUP_TILE)[:, None, None]
        channels = tl.arange(0, PARTS)[None, :, None] * PART + columns[None, None, :]
        own = tl.load(
            query + heads * head_stride + channels, mask=(heads < GROUP) & part, other=0.0
        ).to(tl.float32)
        products = tl.zeros([GROUP_TILE, PARTS, COLUMNS], tl.float32)
        products = tl.fma(tl.maximum(own, 0.0), high, products)
        products = tl.fma(tl.minimum(own, 0.0), low, products)
        sums = tl.sum(tl.sum(products, axis=2), axis=1)
        store_scores(scores, scores_head_stride, whole, whole + 1, sums[:, None], GROUP)


def score_pages(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    place: tuple[int, int],
    record_bytes: int,
    page_size: int,
    bits: int,
    block_table: torch.Tensor,
    rows: torch.Tensor,
    lengths: torch.Tensor,
    scores: torch.Tensor,
) -> None:
    """Upper bounds of the unscaled scores in each page that a query sees.

    The last page of a query has the bounds of the keys that this query sees, which may be fewer
    than are stored: they are made from the keys.

    Source: Quest, arXiv:2406.10774.

    Args:
        query: `[num_queries, num_heads, head_size]`, of any float type; channels side by side.
        kv_cache: See the package; so `place` and the last four.
        place: Of the index.
        record_bytes: Of a page's record, see `kernels.page_bounds`.
        page_size: Tokens of a page, a divisor of the block size.
        bits: Of a code: 2, 4, 8 or 16.
        block_table: Of the batch.
        rows: Of the queries.
        lengths: Of the queries.
        scores: A column per page; written.
    """
    num_queries, num_heads, head_size = query.shape
    heads = kv_cache.shape[1]
    if num_queries == 0:
        return
    group = num_heads // heads
    parts, part = parts_of(head_size, bits)
    columns = padded(part)
    pages = rows_at_once(padded(group), columns, most=64)
    _score_pages[
        (num_queries, heads, splits_of(num_queries * heads, -(-scores.shape[2] // pages)))
    ](
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
        BLOCK_BYTES=block_bytes(kv_cache),
        OFFSET=place[0],
        STRIDE=place[1],
        RECORD_BYTES=record_bytes,
        BLOCK_SIZE=kv_cache.shape[2],
        PAGE_SIZE=page_size,
        HEAD_SIZE=head_size,
        BITS=bits,
        PARTS=parts,
        PART=part,
        GROUP=group,
        GROUP_TILE=padded(group),
        PAGES=pages,
        COLUMNS=columns,
        KEYS=min(KEYS_AT_ONCE, padded(page_size)),
        enable_fp_fusion=False,
    )
