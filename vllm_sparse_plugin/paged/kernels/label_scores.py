"""Labels of keys (Double Sparsity) compared with queries; `channel_labels` says how they lie."""

from __future__ import annotations

import numpy as np
from numba import prange

from vllm_sparse_plugin.paged.kernels.compiled import compiled
from vllm_sparse_plugin.paged.kernels.index_places import first_byte, later_run
from vllm_sparse_plugin.paged.kernels.rows import copy_row, load_row
from vllm_sparse_plugin.paged.kernels.tile_products import padded
from vllm_sparse_plugin.paged.kernels.vectors import (
    LANES,
    fetch_bytes,
    load,
    load_codes_part,
    load_part,
    multiply_add,
    multiply_then_add,
    splat,
    store,
)


@compiled()
def _decode(
    flat: np.ndarray,
    first: int,
    kind: int,
    records: np.ndarray,
    codes: int,
    bits: int,
    block_size: int,
    count: int,
    labels: np.ndarray,
) -> None:
    """Values of one row of labels: at least the first `count` columns of `labels`.

    As `pseudo_quantize` makes them, but for the last bit of the step between codes.

    Args:
        flat: The cache's elements.
        first: Of the row of labels.
        kind: Of the elements.
        records: See `write_labels`.
        codes: Their first byte, from the cache's start.
        bits: Of a code.
        block_size: Tokens of a block.
        count: Tokens that are wanted.
        labels: `[C, padded(block_size)]`, float32; written.
    """
    channels, columns = labels.shape
    per_byte = 8 // bits
    width, mask = (channels + per_byte - 1) // per_byte, (1 << bits) - 1
    zero, minus = splat(np.float32(0.0)), splat(np.float32(-1.0))
    share = splat(np.float32(1.0 / mask))
    for t in range(0, count, LANES):
        left = block_size - t
        low = load_part(flat, first + t, kind, left)
        high = load_part(flat, first + block_size + t, kind, left)
        # Where all values are the same, all codes are 0.
        step = multiply_add(multiply_add(low, minus, high), share, zero)
        for byte in range(width):
            row = codes + byte * block_size + t
            for part in range(per_byte):
                c = byte + part * width
                if c < channels:
                    code = load_codes_part(records, row, part * bits, mask, left)
                    store(labels, c * columns + t, multiply_then_add(code, step, low))


@compiled()
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
        for h in range(0, heads, 4):
            # As in `tile_products`: the last head takes the places of those that are missing.
            many = h + 1 < heads
            c, d = min(h + 2, heads - 1), min(h + 3, heads - 1)
            sum_a, sum_b, sum_c, sum_d = zero, zero, zero, zero
            for channel in range(channels):
                label = load(labels, channel * columns + t, 0)
                sum_a = multiply_add(splat(query[h, channel]), label, sum_a)
                if many:
                    sum_b = multiply_add(splat(query[h + 1, channel]), label, sum_b)
                    sum_c = multiply_add(splat(query[c, channel]), label, sum_c)
                    sum_d = multiply_add(splat(query[d, channel]), label, sum_d)
            store(products, h * columns + t, sum_a)
            if many:
                store(products, (h + 1) * columns + t, sum_b)
                store(products, c * columns + t, sum_c)
                store(products, d * columns + t, sum_d)


@compiled(parallel=True)
def score_labels(
    query: np.ndarray,
    elements: np.ndarray,
    kind: int,
    records: np.ndarray,
    place: tuple[int, int],
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
        place: Of the index.
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
    factor, flat = np.float32(scale), elements.reshape(-1)
    for item in prange(num_queries * num_kv_heads * chunks):
        index, run = item // (num_kv_heads * chunks), item % (num_kv_heads * chunks)
        chunk, kv_head = run // num_kv_heads, run % num_kv_heads
        first = chunk * block_size
        count = min(block_size, lengths[index] - first)
        if count <= 0:
            continue
        blocks = block_table[rows[index]]
        later = later_run(records, place, blocks, run, 1, lengths[index], block_size)
        fetch_bytes(records, later, rows_per_head * row_bytes)
        width = padded(block_size)
        labels = np.zeros((channels, width), np.float32)
        products = np.empty((by_row, width), np.float32)
        for row in range(rows_per_head):
            start = first_byte(records, place, blocks[chunk], kv_head) + row * row_bytes
            first_element = start // elements.itemsize
            if bits == 16:
                for c in range(channels):
                    target = labels[c, :count]
                    channel = load_row(flat, first_element + c * block_size, target, kind)
                    copy_row(channel, target)
            else:
                codes = start + 2 * elements.itemsize * block_size
                _decode(flat, first_element, kind, records, codes, bits, block_size, count, labels)
            head = kv_head * heads + row * by_row
            _multiply(query[index, head : head + by_row], labels, count, products)
            for h in range(by_row):
                target = scores[index, head + h, first : first + count]
                for t in range(count):
                    target[t] = products[h, t] * factor
