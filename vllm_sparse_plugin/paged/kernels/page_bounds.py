"""Bounds of pages (Quest), written with the keys; `page_scores` compares them with queries.

A page's record has the smallest and the largest element per channel. With `bits` 16 it holds them
as the cache's own elements, which may have 8; with less, each of the two rows as codes and, before
them, two float32: the row's smallest value and the step between codes. Codes of less than a byte
share one: byte j of a row of D channels holds channels j, j + D / 2 (4 bits), or j, j + D / 4, ...
(2 bits).

A record is written with the last key of its page: once for a page, not once for a key. Until then
nobody reads it: a query that sees a part of a page makes that part's bounds from the keys.
"""

from __future__ import annotations

import numpy as np
from numba import prange

from vllm_sparse_plugin.paged.kernels.compiled import compiled
from vllm_sparse_plugin.paged.kernels.index_places import first_byte
from vllm_sparse_plugin.paged.kernels.rows import (
    E4M3,
    FLOAT16,
    FLOAT32,
    FROM_FLOAT16,
    first_key,
    load_row,
)

FEW = 4
"""Pages that one thread works on: waking the others would take longer."""
_TO_FLOAT16, _TO_E4M3 = 1 / FROM_FLOAT16, np.float32(2.0**-120)


@compiled()
def bounds_of_keys(
    elements: np.ndarray,
    kind: int,
    first: int,
    count: int,
    bounds: np.ndarray,
    buffer: np.ndarray,
) -> None:
    """Smallest and largest elements of some keys of a block.

    Args:
        elements: See the package; flat.
        kind: Of the elements.
        first: The first key's first element.
        count: Keys, at least 1.
        bounds: `[2, head_size]`, float32; written.
        buffer: `[head_size]`, float32 scratch.
    """
    head_size = bounds.shape[1]
    low, high = bounds[0], bounds[1]
    for place in range(count):
        row = load_row(elements, first + place * head_size, buffer, kind)
        if place == 0:
            for d in range(head_size):
                low[d] = row[d]
                high[d] = row[d]
        else:
            for d in range(head_size):
                low[d] = min(low[d], row[d])
                high[d] = max(high[d], row[d])


@compiled()
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
        if kind == FLOAT32:
            whole = record.view(np.float32)
            for i in range(2 * head_size):
                whole[i] = bounds[i // head_size, i % head_size]
            return
        one = np.empty(1, np.float32)
        word = one.view(np.uint32)
        if kind == E4M3:
            for i in range(2 * head_size):
                one[0] = bounds[i // head_size, i % head_size]
                sign = (word[0] >> np.uint32(24)) & np.uint32(0x80)
                one[0] *= _TO_E4M3
                record[i] = sign | ((word[0] >> np.uint32(20)) & np.uint32(0x7F))
            return
        halves = record.view(np.uint16)
        for i in range(2 * head_size):
            one[0] = bounds[i // head_size, i % head_size]
            if kind == FLOAT16:
                sign = (word[0] >> np.uint32(16)) & np.uint32(0x8000)
                one[0] *= _TO_FLOAT16
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


@compiled()
def _update_page(
    elements: np.ndarray,
    flat: np.ndarray,
    kind: int,
    records: np.ndarray,
    flat_records: np.ndarray,
    place: tuple[int, int],
    record_bytes: int,
    head_size: int,
    block_size: int,
    page_size: int,
    bits: int,
    slots: np.ndarray,
    i: int,
    head: int,
) -> None:
    """The record of a KV head and of the page of the i-th slot, if it is the page's last one."""
    slot = slots[i]
    if slot < 0 or (slot + 1) % page_size > 0:
        return
    block, token = slot // block_size, slot % block_size
    page = token // page_size
    first = page * page_size
    bounds, buffer = np.empty((2, head_size), np.float32), np.empty(head_size, np.float32)
    key = first_key(elements, block, head, block_size, head_size) + first * head_size
    bounds_of_keys(flat, kind, key, page_size, bounds, buffer)
    start = first_byte(records, place, block, head) + page * record_bytes
    encode_bounds(bounds, bits, kind, flat_records[start : start + record_bytes])


@compiled(parallel=True)
def update_pages(
    elements: np.ndarray,
    kind: int,
    records: np.ndarray,
    place: tuple[int, int],
    record_bytes: int,
    head_size: int,
    block_size: int,
    page_size: int,
    bits: int,
    slots: np.ndarray,
) -> None:
    """Writes the records of the pages that are whole now: whose last key is among those written.

    Args:
        elements: See the package, with the new keys.
        kind: Of the elements.
        records: See the package; so `place`.
        place: Of the index.
        record_bytes: Of a page's record.
        head_size: Channels of a key.
        block_size: Tokens of a block.
        page_size: Tokens of a page, a divisor of the block size.
        bits: Of a code.
        slots: Of the written tokens, those of one sequence in order; negative = padding.
    """
    flat, flat_records = elements.reshape(-1), records.reshape(-1)
    count, num_kv_heads = slots.shape[0], elements.shape[1]
    whole = 0
    for slot in slots:
        whole += slot >= 0 and (slot + 1) % page_size == 0
    if whole <= FEW:
        for item in range(count * num_kv_heads):
            _update_page(
                elements,
                flat,
                kind,
                records,
                flat_records,
                place,
                record_bytes,
                head_size,
                block_size,
                page_size,
                bits,
                slots,
                item // num_kv_heads,
                item % num_kv_heads,
            )
    else:
        for item in prange(count * num_kv_heads):
            _update_page(
                elements,
                flat,
                kind,
                records,
                flat_records,
                place,
                record_bytes,
                head_size,
                block_size,
                page_size,
                bits,
                slots,
                item // num_kv_heads,
                item % num_kv_heads,
            )
