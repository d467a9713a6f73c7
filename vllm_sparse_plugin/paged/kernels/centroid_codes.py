"""Codes of keys by a product quantiser (PQCache): made from keys, and looked up in tables.

A codebook is `[num_kv_heads, M, sub_dim + 1, C]`, float32: of each sub-space, the channels of its C
centroids side by side, and then their squared lengths, which are infinite where there is no
centroid. The codes of a token are side by side, `per_byte` of them in each byte, the first one
lowest.

All sums go through their terms one by one, as those of a matrix product of few terms do.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import prange

from vllm_sparse_plugin.paged.kernels.compiled import compiled
from vllm_sparse_plugin.paged.kernels.index_places import first_byte, later_run
from vllm_sparse_plugin.paged.kernels.learned_blocks import (
    chunks_of,
    coded_tokens,
    header_of,
    note_codes,
)
from vllm_sparse_plugin.paged.kernels.rows import first_key, load_row
from vllm_sparse_plugin.paged.kernels.vectors import fetch_bytes


@compiled(fastmath={"contract"})
def _products(vector: np.ndarray, factor: float, book: np.ndarray, sums: np.ndarray) -> None:
    """Dot products of `factor` times a sub-vector with each centroid of its sub-space."""
    sums[:] = np.float32(0.0)
    for k in range(vector.shape[0]):
        number, channel = np.float32(factor) * vector[k], book[k]
        for c in range(sums.shape[0]):
            sums[c] += number * channel[c]


@compiled()
def _nearest(vector: np.ndarray, book: np.ndarray, sums: np.ndarray) -> int:
    """The centroid with the least `|c|^2 - 2 x c`; the lower one wins ties."""
    _products(vector, 2.0, book, sums)
    lengths = book[vector.shape[0]]
    best, least = 0, np.float32(np.inf)
    for c in range(sums.shape[0]):
        distance = lengths[c] - sums[c]
        if distance < least:
            best, least = c, distance
    return best


@compiled(parallel=True)
def encode_keys(
    elements: np.ndarray,
    kind: int,
    records: np.ndarray,
    place: tuple[int, int],
    words: int,
    codes_at: int,
    stored_bits: int,
    block_size: int,
    sub_dim: int,
    num_centroids: int,
    blocks: np.ndarray,
    wanted: np.ndarray,
    tags: np.ndarray,
    places: np.ndarray,
    states: np.ndarray,
    head_size: int,
) -> None:
    """Makes the codes that blocks lack.

    Args:
        elements: See the package.
        kind: Of the elements.
        records: See the package; so `place`.
        place: Of the index.
        words: Of its header.
        codes_at: From there to the codes.
        stored_bits: Of a code: 1, 2, 4 or 8.
        block_size: Tokens of a block.
        sub_dim: Channels of a sub-vector.
        num_centroids: C.
        blocks: `[n]`, int64, each once.
        wanted: `[n]`, int64: tokens that need codes.
        tags: `[n]`, int64: of the codebook.
        places: `[n]`, int64: of the codebook in `states`.
        states: `[places, width]`, float32.
        head_size: Channels of a key.
    """
    num_kv_heads = records.shape[1]
    num_parts = head_size // sub_dim
    per_byte = 8 // stored_bits
    row_bytes = (num_parts + per_byte - 1) // per_byte
    book_size = num_parts * (sub_dim + 1) * num_centroids
    flat, flat_records = elements.reshape(-1), records.reshape(-1)
    for item in prange(blocks.shape[0] * num_kv_heads):
        task, head = item // num_kv_heads, item % num_kv_heads
        block = blocks[task]
        header = header_of(records, place, words, block, head)
        first = coded_tokens(header, tags[task])
        books = states[places[task], head * book_size : (head + 1) * book_size]
        book = books.reshape(num_parts, sub_dim + 1, num_centroids)
        start = first_byte(records, place, block, head) + codes_at
        codes = flat_records[start : start + block_size * row_bytes]
        first_row = first_key(elements, block, head, block_size, head_size)
        buffer = np.empty(head_size, np.float32)
        sums = np.empty(num_centroids, np.float32)
        for token in range(first, wanted[task]):
            key = load_row(flat, first_row + token * head_size, buffer, kind)
            for byte in range(row_bytes):
                packed = 0
                for part in range(per_byte):
                    m = byte * per_byte + part
                    if m < num_parts:
                        code = _nearest(key[m * sub_dim : (m + 1) * sub_dim], book[m], sums)
                        packed |= code << (part * stored_bits)
                codes[token * row_bytes + byte] = packed
        note_codes(header, tags[task], wanted[task])


@compiled(parallel=True)
def fill_tables(
    query: np.ndarray,
    queries: np.ndarray,
    places: np.ndarray,
    states: np.ndarray,
    num_kv_heads: int,
    sub_dim: int,
    tables: np.ndarray,
) -> None:
    """Dot products of the queries' sub-vectors with all centroids.

    Args:
        query: `[num_queries, num_heads, head_size]`, float32.
        queries: `[n]`, int64: which of them.
        places: `[num_queries]`, int64: of their codebooks.
        states: `[places, width]`, float32.
        num_kv_heads: KV heads.
        sub_dim: Channels of a sub-vector.
        tables: `[n, num_kv_heads, M, C, heads of a group]`, float32; written.
    """
    num_parts, num_centroids, group = tables.shape[2], tables.shape[3], tables.shape[4]
    part_size = (sub_dim + 1) * num_centroids
    for item in prange(queries.shape[0] * num_kv_heads * num_parts):
        place, rest = item // (num_kv_heads * num_parts), item % (num_kv_heads * num_parts)
        kv_head, m = rest // num_parts, rest % num_parts
        index = queries[place]
        start = (kv_head * num_parts + m) * part_size
        book = states[places[index], start : start + part_size].reshape(sub_dim + 1, num_centroids)
        sums = np.empty(num_centroids, np.float32)
        for h in range(group):
            vector = query[index, kv_head * group + h, m * sub_dim : (m + 1) * sub_dim]
            _products(vector, 1.0, book, sums)
            for c in range(num_centroids):
                tables[place, kv_head, m, c, h] = sums[c]


@compiled(inline=True)
def _code(codes: np.ndarray, row: np.uint64, bit: np.uint64, bits: np.uint64) -> Any:
    """The code of some bits that begins at a bit of the token whose codes begin at byte `row`."""
    byte = np.uint64(codes[row + (bit >> np.uint64(3))])
    return (byte >> (bit & np.uint64(7))) & ((np.uint64(1) << bits) - np.uint64(1))


@compiled()
def _score_four(
    table: np.ndarray, codes: np.ndarray, stored_bits: int, row_bytes: int, h: int, sums: np.ndarray
) -> None:
    """Sums of table entries of four query heads, from `h` on: `sums` `[4, tokens]`.

    Two tokens at a time, since each sum waits for its last addition; indices are unsigned, since
    signed ones are checked for counting from the end. Together, 2.6 times as fast.
    """
    num_parts, num_centroids, group = table.shape
    flat, bits, width = table.reshape(-1), np.uint64(stored_bits), np.uint64(group)
    step, one, two, three = (
        width * np.uint64(num_centroids),
        np.uint64(1),
        np.uint64(2),
        np.uint64(3),
    )
    last = sums.shape[1] - 1
    for t in range(0, last + 1, 2):
        u = min(t + 1, last)
        row, other_row = np.uint64(t * row_bytes), np.uint64(u * row_bytes)
        a, b, c, d = np.float32(0.0), np.float32(0.0), np.float32(0.0), np.float32(0.0)
        p, q, r, s = np.float32(0.0), np.float32(0.0), np.float32(0.0), np.float32(0.0)
        start, bit = np.uint64(h), np.uint64(0)
        for _ in range(num_parts):
            at = start + _code(codes, row, bit, bits) * width
            a += flat[at]
            b += flat[at + one]
            c += flat[at + two]
            d += flat[at + three]
            at = start + _code(codes, other_row, bit, bits) * width
            p += flat[at]
            q += flat[at + one]
            r += flat[at + two]
            s += flat[at + three]
            start += step
            bit += bits
        sums[0, t], sums[1, t], sums[2, t], sums[3, t] = a, b, c, d
        sums[0, u], sums[1, u], sums[2, u], sums[3, u] = p, q, r, s


@compiled()
def _score_one(
    table: np.ndarray, codes: np.ndarray, stored_bits: int, row_bytes: int, h: int, sums: np.ndarray
) -> None:
    """Sums of table entries of query head `h`: `sums` `[tokens]`."""
    num_parts, num_centroids, group = table.shape
    flat, bits, width = table.reshape(-1), np.uint64(stored_bits), np.uint64(group)
    step = width * np.uint64(num_centroids)
    last = sums.shape[0] - 1
    for t in range(0, last + 1, 2):
        u = min(t + 1, last)
        row, other_row = np.uint64(t * row_bytes), np.uint64(u * row_bytes)
        a, p = np.float32(0.0), np.float32(0.0)
        start, bit = np.uint64(h), np.uint64(0)
        for _ in range(num_parts):
            a += flat[start + _code(codes, row, bit, bits) * width]
            p += flat[start + _code(codes, other_row, bit, bits) * width]
            start += step
            bit += bits
        sums[t], sums[u] = a, p


@compiled(parallel=True)
def score_codes(
    tables: np.ndarray,
    queries: np.ndarray,
    records: np.ndarray,
    place: tuple[int, int],
    stored_bits: int,
    block_size: int,
    block_table: np.ndarray,
    rows: np.ndarray,
    lengths: np.ndarray,
    scores: np.ndarray,
) -> None:
    """Sums of the table entries of each key's codes, for every key that a query sees.

    Args:
        tables: See `fill_tables`.
        queries: `[n]`, int64: whose they are.
        records: See `encode_keys`.
        place: Of the codes, see the package.
        stored_bits: Of a code.
        block_size: Tokens of a block.
        block_table: See the package; so `rows` and `lengths`.
        rows: Of all queries.
        lengths: Of all queries.
        scores: `[num_queries, num_heads, capacity]`, float32; written for these queries.
    """
    _, num_kv_heads, num_parts, _, group = tables.shape
    row_bytes = (num_parts * stored_bits + 7) // 8
    size = block_size * row_bytes
    flat_records = records.reshape(-1)
    chunks = chunks_of(queries, lengths, block_size)
    for item in prange(queries.shape[0] * num_kv_heads * chunks):
        which, run = item // (num_kv_heads * chunks), item % (num_kv_heads * chunks)
        chunk, kv_head = run // num_kv_heads, run % num_kv_heads
        index = queries[which]
        first = chunk * block_size
        count = min(block_size, lengths[index] - first)
        if count <= 0:
            continue
        blocks = block_table[rows[index]]
        later = later_run(records, place, blocks, run, 1, lengths[index], block_size)
        fetch_bytes(records, later, size)
        start = first_byte(records, place, blocks[chunk], kv_head)
        codes = flat_records[start : start + size]
        table = tables[which, kv_head]
        target = scores[index, kv_head * group : (kv_head + 1) * group, first : first + count]
        h = 0
        while h + 4 <= group:
            _score_four(table, codes, stored_bits, row_bytes, h, target[h : h + 4])
            h += 4
        while h < group:
            _score_one(table, codes, stored_bits, row_bytes, h, target[h])
            h += 1
