"""Bounds of pages (Quest) compared with queries."""

from __future__ import annotations

import numpy as np
from numba import prange

from vllm_sparse_plugin.paged.kernels.compiled import compiled
from vllm_sparse_plugin.paged.kernels.index_places import first_byte, later_run
from vllm_sparse_plugin.paged.kernels.page_bounds import bounds_of_keys, encode_bounds
from vllm_sparse_plugin.paged.kernels.rows import first_key
from vllm_sparse_plugin.paged.kernels.vectors import (
    HAS_LOOKUP,
    LANES,
    fetch_bytes,
    load,
    load_codes_part,
    load_number,
    load_part,
    look_codes_up,
    multiply_add,
    multiply_then_add,
    splat,
    total,
)

_LANE_CODES = np.array([*range(LANES), *np.arange(LANES) % 4], np.float32)
"""The codes that the lanes of a table are for, of 4 bits and of 2."""
_AHEAD = 2
"""Runs of records that are asked for before their turn."""


@compiled()
def _score_codes(
    up: np.ndarray,
    down: np.ndarray,
    records: np.ndarray,
    start: int,
    later: int,
    record_bytes: int,
    count: int,
    bits: int,
    part: int,
    step: int,
    scores: np.ndarray,
    column: int,
) -> None:
    """`sum_d max(q_d low_d, q_d high_d)` of some pages for some query heads, from codes.

    Args:
        up: `[heads, vectors * LANES]`, the positive part of the queries, see `_split_query`.
        down: The negative part.
        records: See `update_pages`.
        start: First byte of the pages' records, which lie side by side.
        later: First byte of as many records that are asked for before their turn.
        record_bytes: Of a record.
        count: Pages.
        bits: Of a code.
        part: Bytes of a row of codes.
        step: Codes from one vector's first to the next one's.
        scores: `[heads, pages]`, float32; columns from `column` on are written.
        column: The first page's.
    """
    heads, width = up.shape
    zero, mask = splat(np.float32(0.0)), (1 << bits) - 1
    # Few codes: their numbers are computed once for a page, and looked up.
    looks_up = HAS_LOOKUP and bits <= 4 and part % LANES == 0
    codes_of_lanes = load(_LANE_CODES, LANES if bits == 2 else 0, 0)
    for page in range(count):
        fetch_bytes(records, later, record_bytes)
        least, unit = load_number(records, start), load_number(records, start + 4)
        high_least, high_unit = load_number(records, start + 8), load_number(records, start + 12)
        # In two steps, as `pseudo_quantize` does.
        lows = multiply_then_add(codes_of_lanes, unit, least)
        highs = multiply_then_add(codes_of_lanes, high_unit, high_least)
        for h in range(0, heads, 4):
            sum_a, sum_b, sum_c, sum_d = zero, zero, zero, zero
            # As in `tile_products`: the last head takes the places of those that are missing.
            many = h + 1 < heads
            a, b = h * width, (h + 1) * width
            c, d = min(h + 2, heads - 1) * width, min(h + 3, heads - 1) * width
            for shift in range(0, 8, bits):
                for byte in range(0, part, step):
                    codes, left = start + 16 + byte, part - byte
                    if looks_up:
                        low = look_codes_up(lows, records, codes, shift)
                        high = look_codes_up(highs, records, codes + part, shift)
                    else:
                        low = load_codes_part(records, codes, shift, mask, left)
                        high = load_codes_part(records, codes + part, shift, mask, left)
                        low = multiply_then_add(low, unit, least)
                        high = multiply_then_add(high, high_unit, high_least)
                    sum_a = multiply_add(load(up, a, 0), high, sum_a)
                    sum_a = multiply_add(load(down, a, 0), low, sum_a)
                    if many:
                        sum_b = multiply_add(load(up, b, 0), high, sum_b)
                        sum_c = multiply_add(load(up, c, 0), high, sum_c)
                        sum_d = multiply_add(load(up, d, 0), high, sum_d)
                        sum_b = multiply_add(load(down, b, 0), low, sum_b)
                        sum_c = multiply_add(load(down, c, 0), low, sum_c)
                        sum_d = multiply_add(load(down, d, 0), low, sum_d)
                    a, b, c, d = a + LANES, b + LANES, c + LANES, d + LANES
            scores[h, column + page] = total(sum_a)
            if many:
                scores[h + 1, column + page] = total(sum_b)
                scores[min(h + 2, heads - 1), column + page] = total(sum_c)
                scores[min(h + 3, heads - 1), column + page] = total(sum_d)
        start += record_bytes
        later += record_bytes


@compiled()
def _score_elements(
    up: np.ndarray,
    down: np.ndarray,
    elements: np.ndarray,
    kind: int,
    records: np.ndarray,
    start: int,
    later: int,
    record_bytes: int,
    count: int,
    head_size: int,
    scores: np.ndarray,
    column: int,
) -> None:
    """The same from bounds of 16 bits."""
    heads, width = up.shape
    zero, itemsize = splat(np.float32(0.0)), elements.itemsize
    for page in range(count):
        fetch_bytes(records, later, record_bytes)
        low_at = start // itemsize
        for h in range(heads):
            a, place = zero, h * width
            for d in range(0, head_size, LANES):
                low = load_part(elements, low_at + d, kind, head_size - d)
                high = load_part(elements, low_at + head_size + d, kind, head_size - d)
                a = multiply_add(load(up, place + d, 0), high, a)
                a = multiply_add(load(down, place + d, 0), low, a)
            scores[h, column + page] = total(a)
        start += record_bytes
        later += record_bytes


@compiled()
def _score_records(
    up: np.ndarray,
    down: np.ndarray,
    elements: np.ndarray,
    kind: int,
    records: np.ndarray,
    start: int,
    later: int,
    record_bytes: int,
    count: int,
    bits: int,
    head_size: int,
    step: int,
    scores: np.ndarray,
    column: int,
) -> None:
    """Some pages for some query heads: `_score_codes` or `_score_elements`."""
    if bits == 16:
        _score_elements(
            up,
            down,
            elements,
            kind,
            records,
            start,
            later,
            record_bytes,
            count,
            head_size,
            scores,
            column,
        )
    else:
        part = head_size * bits // 8
        _score_codes(
            up, down, records, start, later, record_bytes, count, bits, part, step, scores, column
        )


@compiled()
def _split_query(query: np.ndarray, step: int, up: np.ndarray, down: np.ndarray) -> None:
    """The positive and the negative part of queries.

    Args:
        query: `[num_heads, head_size]`, float32.
        step: Channels of a vector, at most `LANES`; zeros fill it up.
        up: `[num_heads, vectors * LANES]`, float32; written.
        down: Likewise.
    """
    up[:] = np.float32(0.0)
    down[:] = np.float32(0.0)
    for h in range(up.shape[0]):
        for d in range(query.shape[1]):
            value, place = query[h, d], d // step * LANES + d % step
            up[h, place] = max(value, np.float32(0.0))
            down[h, place] = min(value, np.float32(0.0))


@compiled(parallel=True)
def score_pages(
    query: np.ndarray,
    elements: np.ndarray,
    kind: int,
    records: np.ndarray,
    place: tuple[int, int],
    record_bytes: int,
    block_size: int,
    page_size: int,
    bits: int,
    block_table: np.ndarray,
    rows: np.ndarray,
    lengths: np.ndarray,
    scores: np.ndarray,
) -> None:
    """Upper bounds of the unscaled scores in each page that a query sees.

    The last page of a query has the bounds of the keys that this query sees, which may be fewer
    than are stored: they are made from the keys.

    Args:
        query: `[num_queries, num_heads, head_size]`, float32.
        elements: See the package; so `kind`, `block_table`, `rows`, `lengths`.
        kind: Of the elements.
        records: See `update_pages`, and so the next five.
        place: Of the index.
        record_bytes: Of a record.
        block_size: Tokens of a block.
        page_size: Tokens of a page.
        bits: Of a code.
        block_table: Of the batch.
        rows: Of the queries.
        lengths: Of the queries.
        scores: `[num_queries, num_heads, capacity]`, float32; written.
    """
    num_queries, num_heads, head_size = query.shape
    num_kv_heads = elements.shape[1]
    heads = num_heads // num_kv_heads
    per_block = block_size // page_size
    # Codes of less than a byte lie in parts of the channels, and no vector spans two of them.
    part = head_size if bits == 16 else head_size * bits // 8
    step = LANES
    while part != head_size and part % step:
        step -= 1
    width = (head_size + step - 1) // step * LANES
    up = np.empty((num_queries, num_heads, width), np.float32)
    down = np.empty((num_queries, num_heads, width), np.float32)
    for index in prange(num_queries):
        _split_query(query[index], step, up[index], down[index])
    flat = elements.reshape(-1)
    chunks = (int(lengths.max()) + block_size - 1) // block_size
    for item in prange(num_queries * num_kv_heads * chunks):
        index, run = item // (num_kv_heads * chunks), item % (num_kv_heads * chunks)
        chunk, kv_head = run // num_kv_heads, run % num_kv_heads
        length = lengths[index]
        if chunk * block_size >= length:
            continue
        blocks = block_table[rows[index]]
        later = later_run(records, place, blocks, run, _AHEAD, length, block_size)
        first = kv_head * heads
        target = scores[index, first : first + heads]
        own_up, own_down = up[index, first : first + heads], down[index, first : first + heads]
        column = chunk * per_block
        whole = min(per_block, length // page_size - column)
        _score_records(
            own_up,
            own_down,
            elements,
            kind,
            records,
            first_byte(records, place, blocks[chunk], kv_head),
            later,
            record_bytes,
            whole,
            bits,
            head_size,
            step,
            target,
            column,
        )
        rest_keys = min(block_size, length - chunk * block_size) - whole * page_size
        if rest_keys > 0:
            bounds, buffer = np.empty((2, head_size), np.float32), np.empty(head_size, np.float32)
            key = first_key(elements, blocks[chunk], kv_head, block_size, head_size)
            key += whole * page_size * head_size
            bounds_of_keys(flat, kind, key, rest_keys, bounds, buffer)
            own = np.empty((1, 1, record_bytes), np.uint8)
            encode_bounds(bounds, bits, kind, own[0, 0])
            _score_records(
                own_up,
                own_down,
                own.view(elements.dtype),
                kind,
                own,
                0,
                0,
                record_bytes,
                1,
                bits,
                head_size,
                step,
                target,
                column + whole,
            )
