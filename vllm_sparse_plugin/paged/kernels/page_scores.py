"""Bounds of pages (Quest) compared with queries."""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from vllm_sparse_plugin.paged.kernels.page_bounds import bounds_of_keys, encode_bounds
from vllm_sparse_plugin.paged.kernels.vectors import (
    LANES,
    fetch,
    fetch_bytes,
    load,
    load_codes_part,
    load_number,
    load_part,
    multiply_add,
    multiply_then_add,
    splat,
    total,
)

_AHEAD = 16
"""Records that are asked for before their turn."""


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _score_codes(
    up: np.ndarray,
    down: np.ndarray,
    records: np.ndarray,
    starts: np.ndarray,
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
        starts: int64: bytes of the pages' records, from the cache's start; `_AHEAD` more than
            `count`, which are asked for before their turn.
        count: Pages.
        bits: Of a code.
        part: Bytes of a row of codes.
        step: Codes from one vector's first to the next one's.
        scores: `[heads, pages]`, float32; columns from `column` on are written.
        column: The first page's.
    """
    heads, width = up.shape
    zero, mask = splat(np.float32(0.0)), (1 << bits) - 1
    for page in range(count):
        start, later = starts[page], starts[page + _AHEAD]
        fetch_bytes(records, later, 16 + 2 * part)
        least, unit = load_number(records, start), load_number(records, start + 4)
        high_least, high_unit = load_number(records, start + 8), load_number(records, start + 12)
        h = 0
        while h < heads:
            a, b, c, d = zero, zero, zero, zero
            place, many = h * width, h + 4 <= heads
            for shift in range(0, 8, bits):
                for byte in range(0, part, step):
                    codes, left = start + 16 + byte, part - byte
                    low = load_codes_part(records, codes, shift, mask, left)
                    high = load_codes_part(records, codes + part, shift, mask, left)
                    # In two steps, as `pseudo_quantize` does.
                    low = multiply_then_add(low, unit, least)
                    high = multiply_then_add(high, high_unit, high_least)
                    a = multiply_add(load(up, place, 0), high, a)
                    a = multiply_add(load(down, place, 0), low, a)
                    if many:
                        b = multiply_add(load(up, place + width, 0), high, b)
                        c = multiply_add(load(up, place + 2 * width, 0), high, c)
                        d = multiply_add(load(up, place + 3 * width, 0), high, d)
                        b = multiply_add(load(down, place + width, 0), low, b)
                        c = multiply_add(load(down, place + 2 * width, 0), low, c)
                        d = multiply_add(load(down, place + 3 * width, 0), low, d)
                    place += LANES
            scores[h, column + page] = total(a)
            if many:
                scores[h + 1, column + page] = total(b)
                scores[h + 2, column + page] = total(c)
                scores[h + 3, column + page] = total(d)
            h += 4 if many else 1


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _score_elements(
    up: np.ndarray,
    down: np.ndarray,
    elements: np.ndarray,
    kind: int,
    starts: np.ndarray,
    count: int,
    head_size: int,
    scores: np.ndarray,
    column: int,
) -> None:
    """The same from bounds of 16 bits."""
    heads, width = up.shape
    zero, itemsize = splat(np.float32(0.0)), elements.itemsize
    for page in range(count):
        start, later = starts[page] // itemsize, starts[page + _AHEAD] // itemsize
        for d in range(0, 2 * head_size, LANES):
            fetch(elements, later + d)
        for h in range(heads):
            a, place = zero, h * width
            for d in range(0, head_size, LANES):
                low = load_part(elements, start + d, kind, head_size - d)
                high = load_part(elements, start + head_size + d, kind, head_size - d)
                a = multiply_add(load(up, place + d, 0), high, a)
                a = multiply_add(load(down, place + d, 0), low, a)
            scores[h, column + page] = total(a)


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _score_records(
    up: np.ndarray,
    down: np.ndarray,
    elements: np.ndarray,
    kind: int,
    records: np.ndarray,
    starts: np.ndarray,
    count: int,
    bits: int,
    head_size: int,
    step: int,
    scores: np.ndarray,
    column: int,
) -> None:
    """Some pages for some query heads: `_score_codes` or `_score_elements`."""
    if bits == 16:
        _score_elements(up, down, elements, kind, starts, count, head_size, scores, column)
    else:
        part = head_size * bits // 8
        _score_codes(up, down, records, starts, count, bits, part, step, scores, column)


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _split_query(
    query: np.ndarray, first: int, step: int, up: np.ndarray, down: np.ndarray
) -> None:
    """The positive and the negative part of a group's queries.

    Args:
        query: `[num_heads, head_size]`, float32.
        first: Query head of the group.
        step: Channels of a vector, at most `LANES`; zeros fill it up.
        up: `[heads, vectors * LANES]`, float32; written.
        down: Likewise.
    """
    up[:] = np.float32(0.0)
    down[:] = np.float32(0.0)
    for h in range(up.shape[0]):
        for d in range(query.shape[1]):
            value, place = query[first + h, d], d // step * LANES + d % step
            up[h, place] = max(value, np.float32(0.0))
            down[h, place] = min(value, np.float32(0.0))


@njit(parallel=True, nogil=True, cache=True)  # type: ignore[untyped-decorator]
def score_pages(
    query: np.ndarray,
    elements: np.ndarray,
    kind: int,
    records: np.ndarray,
    offset: int,
    record_bytes: int,
    block_size: int,
    page_size: int,
    bits: int,
    block_table: np.ndarray,
    rows: np.ndarray,
    lengths: np.ndarray,
    chunk: int,
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
        offset: Of the index.
        record_bytes: Of a record.
        block_size: Tokens of a block.
        page_size: Tokens of a page.
        bits: Of a code.
        block_table: Of the batch.
        rows: Of the queries.
        lengths: Of the queries.
        chunk: Pages that one task scores.
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
    longest = 0
    for index in range(num_queries):
        longest = max(longest, lengths[index])
    chunks = ((longest + page_size - 1) // page_size + chunk - 1) // chunk
    for item in prange(num_queries * num_kv_heads * chunks):
        index, rest = item // (num_kv_heads * chunks), item % (num_kv_heads * chunks)
        kv_head, first = rest // chunks, rest % chunks * chunk
        length = lengths[index]
        pages = (length + page_size - 1) // page_size
        if first >= pages:
            continue
        width = (head_size + step - 1) // step * LANES
        up, down = np.empty((heads, width), np.float32), np.empty((heads, width), np.float32)
        _split_query(query[index], kv_head * heads, step, up, down)
        target = scores[index, kv_head * heads : (kv_head + 1) * heads]
        blocks = block_table[rows[index]]
        last = min(first + chunk, pages)
        whole = min(last, length // page_size)
        starts = np.empty(chunk + _AHEAD, np.int64)
        for number in range(first // per_block, (last + per_block - 1) // per_block):
            begin = number * per_block
            start = (np.int64(blocks[number]) * num_kv_heads + kv_head) * records.shape[2] + offset
            for page in range(max(begin, first), min(begin + per_block, last)):
                starts[page - first] = start + (page - begin) * record_bytes
        starts[last - first :] = starts[last - first - 1]
        _score_records(
            up,
            down,
            elements,
            kind,
            records,
            starts,
            whole - first,
            bits,
            head_size,
            step,
            target,
            first,
        )
        if whole < last:
            bounds, buffer = np.empty((2, head_size), np.float32), np.empty(head_size, np.float32)
            block, key = np.int64(blocks[whole // per_block]), whole % per_block * page_size
            count = length - whole * page_size
            bounds_of_keys(elements, kind, block, kv_head, key, count, bounds, buffer)
            own = np.empty((1, 1, record_bytes), np.uint8)
            encode_bounds(bounds, bits, kind, own[0, 0])
            starts[:] = 0
            _score_records(
                up,
                down,
                own.view(elements.dtype),
                kind,
                own,
                starts,
                1,
                bits,
                head_size,
                step,
                target,
                whole,
            )
