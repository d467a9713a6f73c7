"""Bounds of pages (Quest) compared with queries: see `page_products`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_sparse_plugin.paged.triton_kernels.grids import await_launches, launched, overlapped
from vllm_sparse_plugin.paged.triton_kernels.page_bounds import (
    KEYS_AT_ONCE,
    bounds_of_keys,
    parts_of,
)
from vllm_sparse_plugin.paged.triton_kernels.page_products import (
    add_products,
    codes_of_words,
    float16_factors,
    operands_of,
    scales_of_pages,
    starts_of_pages,
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

ENOUGH_PROGRAMS = 512
"""That keep a large GPU busy, about four for each processor. More of them share no longer scans."""
_MOST_TILES = 4
"""Of a program, while there are programs left to start. Before its first tile, it does the work of
about two; long scans among short ones need many programs."""
_PAGES, _WARPS, _STAGES = 32, 1, 2
"""Of programs. Many small ones, whose warps need not wait for each other. (Measured on an H200,
batch 8, 4 bits, 32K keys: 13.5 us; with two warps and 64 pages, 15.3 us.)"""


@triton.jit
def _score_last_page(
    query,
    head_stride,
    keys,
    count,
    HEAD_SIZE: tl.constexpr,
    BITS: tl.constexpr,
    PARTS: tl.constexpr,
    PART: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_TILE: tl.constexpr,
    KEYS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Scores of some keys' own bounds, `[GROUP_TILE, 1]`, float32.

    Args:
        query: Pointer to the group's first query.
        head_stride: From one query head's to the next one's.
        keys: Pointer to the first key.
        count: Keys, at least 1.
        HEAD_SIZE: Channels of a key.
        BITS: Of a code.
        PARTS: See `parts_of`.
        PART: See `parts_of`.
        GROUP: Query heads.
        GROUP_TILE: The same as an axis.
        KEYS: That are loaded at once.
        COLUMNS: `PART` as an axis.
    """
    columns = tl.arange(0, COLUMNS)[None, None, :]
    inside = columns < PART
    low, high = bounds_of_keys(keys, count, HEAD_SIZE, PARTS, PART, KEYS, COLUMNS)
    low, high = low[None, :, :], high[None, :, :]
    if BITS < 16:
        # In two steps, as `pseudo_quantize` does.
        least, step = smallest_and_step(low, inside, BITS)
        low = codes_of(low, least, step, BITS) * step + least
        least, step = smallest_and_step(high, inside, BITS)
        high = codes_of(high, least, step, BITS) * step + least
    heads = tl.arange(0, GROUP_TILE)[:, None, None]
    channels = tl.arange(0, PARTS)[None, :, None] * PART + columns
    mask = (heads < GROUP) & inside
    own = tl.load(query + heads * head_stride + channels, mask=mask, other=0.0).to(tl.float32)
    products = tl.zeros([GROUP_TILE, PARTS, COLUMNS], tl.float32)
    products = tl.fma(tl.maximum(own, 0.0), high, products)
    products = tl.fma(tl.minimum(own, 0.0), low, products)
    return tl.sum(tl.sum(products, axis=2), axis=1)[:, None]


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
    HEADS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PAGES: tl.constexpr,
    UNITS: tl.constexpr,
    COLUMNS: tl.constexpr,
    KEYS: tl.constexpr,
    IN_FLOAT32: tl.constexpr,
    IS_INTERPRETED: tl.constexpr,
    PIECES: tl.constexpr,
    ENOUGH: tl.constexpr,
    MOST_TILES: tl.constexpr,
    IS_OVERLAPPED: tl.constexpr,
):
    await_launches(IS_OVERLAPPED)
    per_block: tl.constexpr = BLOCK_SIZE // PAGE_SIZE
    # Heads first: their records of a block are neighbours.
    kv_head, index, split = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    # The row is asked for together with the length, not when that has come.
    length, row = tl.load(lengths + index), tl.load(rows + index).to(tl.int64)
    whole = length // PAGE_SIZE
    tiles = tl.cdiv(whole, PAGES)
    share = tiles * tl.num_programs(0) * tl.num_programs(1) // ENOUGH
    share = tl.minimum(tl.maximum(share, 1), MOST_TILES)
    programs = tl.minimum(tl.maximum(tl.cdiv(tiles, share), 1), tl.num_programs(2))
    if (split < programs) & (length > 0):
        blocks = block_table + row * table_stride
        memory = cache.to(tl.pointer_type(tl.uint8))
        query += index * query_stride + kv_head * GROUP * head_stride
        scores += index * scores_stride + kv_head * GROUP * scores_head_stride
        PLACES: tl.constexpr = 16 // BITS
        SIDES: tl.constexpr = 1 if BITS == 16 else 2
        WIDTH: tl.constexpr = 2 * HEAD_SIZE if BITS == 16 else PART
        units = tl.arange(0, UNITS)
        mask = (units < WIDTH)[None, :]
        channels = tl.arange(0, CHANNELS)
        every = load_queries(query, head_stride, channels, channels < HEAD_SIZE, GROUP, HEADS)
        factor = tl.full([HEADS], 1.0, tl.float32)
        inverse = factor
        if BITS < 16:
            factor, inverse = float16_factors(tl.max(tl.abs(every), axis=1))
        down, up = tl.sum(tl.minimum(every, 0.0), axis=1), tl.sum(tl.maximum(every, 0.0), axis=1)
        operands = operands_of(
            query,
            head_stride,
            factor,
            tl.float16 if BITS < 16 else tl.float32 if IN_FLOAT32 else query.dtype.element_ty,
            BITS,
            PART,
            UNITS,
            SIDES,
            HEADS,
            GROUP,
            PIECES,
        )
        records = memory + OFFSET + kv_head * STRIDE
        if BITS < 16:
            starts = starts_of_pages(
                blocks, split, whole, BLOCK_BYTES, RECORD_BYTES, per_block, PAGES
            )
            least, step = scales_of_pages(records + starts, PAGES)
        for tile in tl.range(split, tiles, programs):
            starts = starts_of_pages(
                blocks, tile, whole, BLOCK_BYTES, RECORD_BYTES, per_block, PAGES
            )
            sums = tl.zeros([PAGES, HEADS * SIDES], tl.float32)
            if BITS == 16:
                bounds = (records + starts).to(cache.dtype)[:, None] + units[None, :]
                bounds = tl.load(bounds, mask=mask, other=0.0)
                sums = add_products(operands[0], bounds, sums, IN_FLOAT32)
            else:
                words = (records + starts + 16).to(tl.pointer_type(tl.uint16))
                words = tl.load(words[:, None] + units[None, :], mask=mask, other=0)
                for place in tl.static_range(PLACES):
                    codes = codes_of_words(
                        words, place % 2, place // 2 * BITS, BITS, not IS_INTERPRETED
                    )
                    for piece in tl.static_range(PIECES):
                        sums = add_products(operands[place * PIECES + piece], codes, sums, False)
                of_lows, of_highs = tl.split(tl.reshape(sums, [PAGES, HEADS, SIDES]))
                low, high = tl.split(least)
                low_step, high_step = tl.split(step)
                sums = tl.fma(
                    of_lows * inverse[None, :], low_step[:, None], down[None, :] * low[:, None]
                ) + tl.fma(
                    of_highs * inverse[None, :], high_step[:, None], up[None, :] * high[:, None]
                )
                # Triton asks for codes ahead of their turn, but not for what meets no matrix.
                tile_after = tl.minimum(tile + programs, tiles - 1)
                starts = starts_of_pages(
                    blocks, tile_after, whole, BLOCK_BYTES, RECORD_BYTES, per_block, PAGES
                )
                least, step = scales_of_pages(records + starts, PAGES)
            store_scores(scores, scores_head_stride, tile * PAGES, whole, tl.trans(sums), GROUP)
        rest = length - whole * PAGE_SIZE
        if (rest > 0) & (split == tiles % programs):
            # The last page has the bounds of the keys that this query sees: they are made of those.
            block = tl.load(blocks + whole // per_block).to(tl.int64)
            keys = (memory + block * BLOCK_BYTES).to(cache.dtype)
            keys += (kv_head * BLOCK_SIZE + whole % per_block * PAGE_SIZE) * (2 * HEAD_SIZE)
            sums = _score_last_page(
                query,
                head_stride,
                keys,
                rest,
                HEAD_SIZE,
                BITS,
                PARTS,
                PART,
                GROUP,
                GROUP_TILE,
                KEYS,
                COLUMNS,
            )
            store_scores(scores, scores_head_stride, whole, whole + 1, sums, GROUP)


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
    is_coded = bits < 16
    units = max(16, padded(part if is_coded else 2 * head_size))
    # Tensor cores multiply 8 columns at once: codes' lows and highs have their own.
    columns = max(4 if is_coded else 8, padded(group))
    pages = rows_at_once(units, least=16, most=_PAGES)
    is_half = query.dtype != torch.float32
    # Triton's interpreter multiplies bfloat16s wrongly.
    is_wrong = kv_cache.device.type == "cpu" and query.dtype == torch.bfloat16
    is_other = query.dtype != kv_cache.dtype and kv_cache.itemsize > 1
    in_float32 = not is_coded and (not is_half or is_wrong or is_other)
    _score_pages[
        (heads, num_queries, splits_of(num_queries * heads, -(-scores.shape[2] // pages)))
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
        HEADS=columns,
        CHANNELS=padded(head_size),
        PAGES=pages,
        UNITS=units,
        COLUMNS=padded(part),
        KEYS=min(KEYS_AT_ONCE, padded(page_size)),
        IN_FLOAT32=in_float32,
        IS_INTERPRETED=not isinstance(_score_pages, triton.JITFunction),
        PIECES=3 if is_coded and not is_half else 1,
        ENOUGH=ENOUGH_PROGRAMS,
        MOST_TILES=_MOST_TILES,
        enable_fp_fusion=False,
        num_warps=_WARPS,
        num_stages=_STAGES,
        **overlapped(kv_cache.device),
    )
