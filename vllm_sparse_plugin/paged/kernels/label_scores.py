"""Labels of keys (Double Sparsity) compared with queries; `channel_labels` says how they lie."""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from vllm_sparse_plugin.paged.kernels.rounding import round_to_kind
from vllm_sparse_plugin.paged.kernels.rows import FLOAT32, load_row
from vllm_sparse_plugin.paged.kernels.tile_products import padded
from vllm_sparse_plugin.paged.kernels.vectors import (
    LANES,
    fetch_bytes,
    load,
    load_codes_part,
    load_numbers_part,
    multiply_add,
    multiply_then_add,
    splat,
    store,
)


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _decode(
    records: np.ndarray,
    start: int,
    bits: int,
    kind: int,
    block_size: int,
    count: int,
    labels: np.ndarray,
) -> None:
    """Values of one row of labels: at least the first `count` columns of `labels`.

    Multiplied and added in two steps, as `pseudo_quantize` does.

    Args:
        records: See `write_labels`.
        start: Byte of the row of labels, from the cache's start.
        bits: Of a code.
        kind: Of the cache's elements.
        block_size: Tokens of a block.
        count: Tokens that are wanted.
        labels: `[C, padded(block_size)]`, float32; written.
    """
    channels, columns = labels.shape
    per_byte = 8 // bits
    width, mask = (channels + per_byte - 1) // per_byte, (1 << bits) - 1
    codes = start + 8 * block_size
    for t in range(0, count, LANES):
        left = block_size - t
        low = load_numbers_part(records, start + 4 * t, left)
        step = load_numbers_part(records, start + 4 * (block_size + t), left)
        for byte in range(width):
            row = codes + byte * block_size + t
            for part in range(per_byte):
                c = byte + part * width
                if c < channels:
                    code = load_codes_part(records, row, part * bits, mask, left)
                    store(labels, c * columns + t, multiply_then_add(code, step, low))
    if kind != FLOAT32:
        for c in range(channels):
            round_to_kind(labels[c, :count], kind)


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _multiply(query: np.ndarray, labels: np.ndarray, count: int, products: np.ndarray) -> None:
    """`query @ labels`, at least the first `count` columns.

    Args:
        query: `[heads, C]`, float32.
        labels: `[C, padded(block_size)]`, float32.
        count: Columns that are wanted.
        products: `[heads, padded(block_size)]`, float32; written.
    """
    channels, columns = labels.shape
    heads = query.shape[0]
    zero = splat(np.float32(0.0))
    for t in range(0, count, LANES):
        h = 0
        while h < heads:
            many = h + 4 <= heads
            a, b, c, d = zero, zero, zero, zero
            for channel in range(channels):
                label = load(labels, channel * columns + t, 0)
                a = multiply_add(splat(query[h, channel]), label, a)
                if many:
                    b = multiply_add(splat(query[h + 1, channel]), label, b)
                    c = multiply_add(splat(query[h + 2, channel]), label, c)
                    d = multiply_add(splat(query[h + 3, channel]), label, d)
            store(products, h * columns + t, a)
            if many:
                store(products, (h + 1) * columns + t, b)
                store(products, (h + 2) * columns + t, c)
                store(products, (h + 3) * columns + t, d)
            h += 4 if many else 1


@njit(parallel=True, nogil=True, cache=True)  # type: ignore[untyped-decorator]
def score_labels(
    query: np.ndarray,
    elements: np.ndarray,
    kind: int,
    records: np.ndarray,
    offset: int,
    row_bytes: int,
    bits: int,
    rows_per_head: int,
    block_size: int,
    block_table: np.ndarray,
    rows: np.ndarray,
    lengths: np.ndarray,
    scale: float,
    scores: np.ndarray,
) -> None:
    """Dot products of the queries' kept channels with the labels of every key that they see.

    Args:
        query: `[num_queries, num_heads, C]`, float32: the channels of each head's row of labels.
        elements: See the package; so `kind`, `block_table`, `rows` and `lengths`.
        kind: Of the elements.
        records: See `write_labels`; so the next three.
        offset: Of the index.
        row_bytes: Of one row of labels.
        bits: Of a code.
        rows_per_head: Rows of labels per KV head: one, or one per query head.
        block_size: Tokens of a block.
        block_table: Of the batch.
        rows: Of the queries.
        lengths: Of the queries.
        scale: Of the products.
        scores: `[num_queries, num_heads, capacity]`, float32; written.
    """
    num_queries, num_heads, channels = query.shape
    num_kv_heads = elements.shape[1]
    heads = num_heads // num_kv_heads
    by_row = heads // rows_per_head
    chunks = (int(lengths.max()) + block_size - 1) // block_size
    factor = np.float32(scale)
    for item in prange(num_queries * num_kv_heads * chunks):
        index, rest = item // (num_kv_heads * chunks), item % (num_kv_heads * chunks)
        kv_head, chunk = rest // chunks, rest % chunks
        first = chunk * block_size
        count = min(block_size, lengths[index] - first)
        if count <= 0:
            continue
        block = np.int64(block_table[rows[index], chunk])
        if first + block_size < lengths[index]:
            ahead = np.int64(block_table[rows[index], chunk + 1])
            first_byte = (ahead * num_kv_heads + kv_head) * records.shape[2] + offset
            fetch_bytes(records, first_byte, rows_per_head * row_bytes)
        width = padded(block_size)
        labels = np.zeros((channels, width), np.float32)
        products = np.empty((by_row, width), np.float32)
        for row in range(rows_per_head):
            start = offset + row * row_bytes
            if bits == 16:
                first_element = start // elements.itemsize
                for c in range(channels):
                    where = first_element + c * block_size
                    target = labels[c, :count]
                    target[:] = load_row(elements, block, kv_head, where, target, kind)
            else:
                place = (block * num_kv_heads + kv_head) * records.shape[2] + start
                _decode(records, place, bits, kind, block_size, count, labels)
            head = kv_head * heads + row * by_row
            _multiply(query[index, head : head + by_row], labels, count, products)
            for h in range(by_row):
                target = scores[index, head + h, first : first + count]
                for t in range(count):
                    target[t] = products[h, t] * factor
