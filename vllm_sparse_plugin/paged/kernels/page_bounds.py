"""Bounds of pages (Quest): written with the keys, and compared with queries.

A page's record has the smallest and the largest element per channel. With `bits` 16 it holds them
as the cache's own elements; with less, each of the two rows as codes and, before them, two float32:
the row's smallest value and the step between codes. Codes of less than a byte share one: byte j of
a row of D channels holds channels j, j + D / 2 (4 bits), or j, j + D / 4, ... (2 bits).
"""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from vllm_sparse_plugin.paged.kernels.prefetch import prefetch
from vllm_sparse_plugin.paged.kernels.rows import FLOAT16, load_row

_SINGLE_TO_HALF = np.float32(2.0**-112)


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def bounds_of_keys(
    elements: np.ndarray,
    kind: int,
    block: int,
    head: int,
    first: int,
    count: int,
    bounds: np.ndarray,
    buffer: np.ndarray,
) -> None:
    """Smallest and largest elements of some keys of a block.

    Args:
        elements: See the package.
        kind: Of the elements.
        block: Of the cache.
        head: KV head.
        first: Place of the first key in the block.
        count: Keys, at least 1.
        bounds: `[2, head_size]`, float32; written.
        buffer: `[head_size]`, float32 scratch.
    """
    head_size = bounds.shape[1]
    low, high = bounds[0], bounds[1]
    for place in range(first, first + count):
        row = load_row(elements, block, head, place * head_size, buffer, kind)
        if place == first:
            for d in range(head_size):
                low[d] = row[d]
                high[d] = row[d]
        else:
            for d in range(head_size):
                low[d] = min(low[d], row[d])
                high[d] = max(high[d], row[d])


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def encode_bounds(bounds: np.ndarray, bits: int, kind: int, record: np.ndarray) -> None:
    """Writes a page's record; the codes are those of `pseudo_quantize`.

    Args:
        bounds: `[2, head_size]`, float32; with 16 bits, values that the cache's type holds.
        bits: Of a code.
        kind: Of the cache's elements.
        record: uint8, as long as a record; written.
    """
    head_size = bounds.shape[1]
    if bits == 16:
        if kind == 0:
            whole = record.view(np.float32)
            for i in range(2 * head_size):
                whole[i] = bounds[i // head_size, i % head_size]
            return
        halves = record.view(np.uint16)
        one = np.empty(1, np.float32)
        word = one.view(np.uint32)
        for i in range(2 * head_size):
            one[0] = bounds[i // head_size, i % head_size]
            if kind == FLOAT16:
                sign = (word[0] >> np.uint32(16)) & np.uint32(0x8000)
                one[0] *= _SINGLE_TO_HALF
                halves[i] = sign | ((word[0] >> np.uint32(13)) & np.uint32(0x7FFF))
            else:
                halves[i] = word[0] >> np.uint32(16)
        return
    scales = record[:16].view(np.float32)
    levels = np.float32((1 << bits) - 1)
    per_byte = 8 // bits
    width = head_size // per_byte
    for side in range(2):
        low, high = bounds[side, 0], bounds[side, 0]
        for d in range(head_size):
            low = min(low, bounds[side, d])
            high = max(high, bounds[side, d])
        step = (high - low) / levels if high > low else np.float32(1.0)
        scales[2 * side] = low
        scales[2 * side + 1] = step
        start = 16 + side * width
        for byte in range(width):
            packed = 0
            for part in range(per_byte):
                code = np.rint((bounds[side, byte + part * width] - low) / step)
                packed |= int(min(max(code, np.float32(0.0)), levels)) << (part * bits)
            record[start + byte] = packed


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def decode_bounds(
    record: np.ndarray, bits: int, kind: int, low: np.ndarray, high: np.ndarray
) -> None:
    """The bounds that a page's record holds.

    Args:
        record: uint8, as `encode_bounds` writes it.
        bits: Of a code.
        kind: Of the cache's elements.
        low: `[head_size]`, float32; written.
        high: Likewise.
    """
    head_size = low.shape[0]
    if bits == 16:
        if kind == 0:
            whole = record.view(np.float32)
            for d in range(head_size):
                low[d] = whole[d]
                high[d] = whole[head_size + d]
        else:
            halves = record.view(np.uint16).reshape(1, 1, record.shape[0] // 2)
            load_row(halves, 0, 0, 0, low, kind)
            load_row(halves, 0, 0, head_size, high, kind)
        return
    scales = record[:16].view(np.float32)
    least, step = scales[0], scales[1]
    high_least, high_step = scales[2], scales[3]
    per_byte = 8 // bits
    width = head_size // per_byte
    # Cut out, since an index with an offset keeps loops from becoming vector instructions.
    low_codes, high_codes = record[16 : 16 + width], record[16 + width : 16 + 2 * width]
    if bits == 8:
        for d in range(head_size):
            low[d] = np.float32(low_codes[d]) * step + least
        for d in range(head_size):
            high[d] = np.float32(high_codes[d]) * high_step + high_least
        return
    mask = np.uint8((1 << bits) - 1)
    for part in range(per_byte):
        shift = np.uint8(part * bits)
        low_part, high_part = low[part * width :], high[part * width :]
        for byte in range(width):
            low_part[byte] = np.float32((low_codes[byte] >> shift) & mask) * step + least
        for byte in range(width):
            code = np.float32((high_codes[byte] >> shift) & mask)
            high_part[byte] = code * high_step + high_least


@njit(fastmath=True, nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _score_bounds(
    up: np.ndarray,
    down: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    scores: np.ndarray,
    page: int,
) -> None:
    """`sum_d max(q_d low_d, q_d high_d)` of one page for some query heads.

    Args:
        up: `[heads, head_size]`, the positive part of the queries.
        down: The negative part.
        low: `[head_size]`.
        high: `[head_size]`.
        scores: `[heads, pages]`; column `page` is written.
        page: Column.
    """
    for h in range(up.shape[0]):
        score = np.float32(0.0)
        for d in range(up.shape[1]):
            score += up[h, d] * high[d] + down[h, d] * low[d]
        scores[h, page] = score


@njit(parallel=True, nogil=True, cache=True)  # type: ignore[untyped-decorator]
def update_pages(
    elements: np.ndarray,
    kind: int,
    records: np.ndarray,
    offset: int,
    record_bytes: int,
    head_size: int,
    block_size: int,
    page_size: int,
    bits: int,
    slots: np.ndarray,
) -> None:
    """Makes the records of all pages that were written to right again, partial ones too.

    Args:
        elements: See the package, with the new keys.
        kind: Of the elements.
        records: The same memory as uint8, `[num_blocks, num_kv_heads, bytes]`.
        offset: Of the index in a block and head, bytes.
        record_bytes: Of a page's record.
        head_size: Channels of a key.
        block_size: Tokens of a block.
        page_size: Tokens of a page, a divisor of the block size.
        bits: Of a code.
        slots: Of the written tokens, those of one sequence in order; negative = padding.
    """
    for i in prange(slots.shape[0]):
        slot = slots[i]
        # The last token of a page that is written here does it for the page.
        is_last = i + 1 == slots.shape[0] or slots[i + 1] != slot + 1
        if slot < 0 or not (is_last or (slot + 1) % page_size == 0):
            continue
        block, place = slot // block_size, slot % block_size
        page = place // page_size
        first = page * page_size
        bounds = np.empty((2, head_size), np.float32)
        buffer = np.empty(head_size, np.float32)
        start = offset + page * record_bytes
        for head in range(elements.shape[1]):
            bounds_of_keys(elements, kind, block, head, first, place + 1 - first, bounds, buffer)
            encode_bounds(bounds, bits, kind, records[block, head, start : start + record_bytes])


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
        up = np.empty((heads, head_size), np.float32)
        down = np.empty((heads, head_size), np.float32)
        for h in range(heads):
            for d in range(head_size):
                value = query[index, kv_head * heads + h, d]
                up[h, d] = max(value, np.float32(0.0))
                down[h, d] = min(value, np.float32(0.0))
        low, high = np.empty(head_size, np.float32), np.empty(head_size, np.float32)
        target = scores[index, kv_head * heads : (kv_head + 1) * heads]
        blocks = block_table[rows[index]]
        last = min(first + chunk, pages)
        for block_index in range(first // per_block, (last + per_block - 1) // per_block):
            block = blocks[block_index]
            stored = records[block, kv_head, offset : offset + per_block * record_bytes]
            begin = block_index * per_block
            if begin + per_block < last:
                # The next block's records, while this one's are compared.
                following = blocks[block_index + 1]
                prefetch(records, following, kv_head, offset, per_block * record_bytes)
            for page in range(max(begin, first), min(begin + per_block, last)):
                place = page - begin
                if (page + 1) * page_size <= length:
                    record = stored[place * record_bytes : (place + 1) * record_bytes]
                    decode_bounds(record, bits, kind, low, high)
                else:
                    bounds = np.empty((2, head_size), np.float32)
                    count = length - page * page_size
                    bounds_of_keys(
                        elements, kind, block, kv_head, place * page_size, count, bounds, low
                    )
                    own = np.empty(record_bytes, np.uint8)
                    encode_bounds(bounds, bits, kind, own)
                    decode_bounds(own, bits, kind, low, high)
                _score_bounds(up, down, low, high, target, page)
