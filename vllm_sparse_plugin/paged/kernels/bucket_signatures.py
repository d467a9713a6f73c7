"""Signatures of keys and queries (MagicPIG): in each of L hash tables, the number of a bucket.

A bucket is the signs of K projections, the first one highest; 0 counts as positive. The signatures
of a block and KV head are kept table by table, `[L, block_size]`, in the smallest unsigned integers
that hold K bits, so that neighbouring tokens are compared together.
"""

from __future__ import annotations

import math
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

_COLUMNS = 512
"""Projections that are worked on at once, about: those of all channels stay in the cache."""
_TINY = np.finfo(np.float32).tiny
_SMALLEST = 1e-12
"""Of probabilities, as in the reference."""


@compiled(fastmath={"contract"})
def _project(vector: np.ndarray, matrix: np.ndarray, first: int, sums: np.ndarray) -> None:
    """The vector times columns of a matrix from `first` on, term by term."""
    sums[:] = np.float32(0.0)
    for k in range(vector.shape[0]):
        number, row = vector[k], matrix[k, first : first + sums.shape[0]]
        for j in range(sums.shape[0]):
            sums[j] += number * row[j]


@compiled()
def _buckets(projected: np.ndarray, bits: int, buckets: np.ndarray) -> None:
    """The bucket of each table: the signs of its projections."""
    for table in range(buckets.shape[0]):
        code = np.uint64(0)
        for bit in range(bits):
            code = (code << np.uint64(1)) | np.uint64(projected[table * bits + bit] >= 0)
        buckets[table] = code


@compiled(parallel=True)
def sign_queries(
    query: np.ndarray, projections: np.ndarray, bits: int, signatures: np.ndarray
) -> None:
    """The queries' signatures.

    Args:
        query: `[num_queries, num_heads, head_size]`, float32.
        projections: `[num_kv_heads, head_size, L * bits]`, float32.
        bits: Of a table.
        signatures: `[num_queries, num_heads, L]`, unsigned; written.
    """
    num_queries, num_heads, _ = query.shape
    group = num_heads // projections.shape[0]
    for item in prange(num_queries * num_heads):
        index, head = item // num_heads, item % num_heads
        sums = np.empty(projections.shape[2], np.float32)
        _project(query[index, head], projections[head // group], 0, sums)
        _buckets(sums, bits, signatures[index, head])


@compiled(parallel=True)
def sign_keys(
    elements: np.ndarray,
    kind: int,
    records: np.ndarray,
    place: tuple[int, int],
    words: int,
    codes_at: int,
    block_size: int,
    projections: np.ndarray,
    bits: int,
    width: int,
    blocks: np.ndarray,
    wanted: np.ndarray,
    tags: np.ndarray,
    places: np.ndarray,
    means: np.ndarray,
) -> None:
    """Makes the signatures that blocks lack.

    Args:
        elements: See the package.
        kind: Of the elements.
        records: See the package; so `place`.
        place: Of the index.
        words: Of its header.
        codes_at: From there to the signatures.
        block_size: Tokens of a block.
        projections: `[num_kv_heads, head_size, L * bits]`, float32.
        bits: Of a table.
        width: Bytes of a stored bucket.
        blocks: `[n]`, int64, each once.
        wanted: `[n]`, int64: tokens that need signatures.
        tags: `[n]`, int64: of the mean.
        places: `[n]`, int64: of the mean in `means`.
        means: `[places, num_kv_heads * head_size]`, float32, subtracted from keys.
    """
    num_kv_heads, head_size, columns = projections.shape
    tables = columns // bits
    at_once = min(tables, max(1, _COLUMNS // bits))
    size = tables * block_size * width
    flat, flat_records = elements.reshape(-1), records.reshape(-1)
    for item in prange(blocks.shape[0] * num_kv_heads):
        task, head = item // num_kv_heads, item % num_kv_heads
        block = blocks[task]
        header = header_of(records, place, words, block, head)
        first = coded_tokens(header, tags[task])
        mean = means[places[task], head * head_size : (head + 1) * head_size]
        start = first_byte(records, place, block, head) + codes_at
        stored = flat_records[start : start + size]
        first_row = first_key(elements, block, head, block_size, head_size)
        buffer = np.empty(head_size, np.float32)
        centred = np.empty(head_size, np.float32)
        sums = np.empty(at_once * bits, np.float32)
        buckets = np.empty(at_once, np.uint64)
        for table in range(0, tables, at_once):
            count = min(at_once, tables - table)
            for token in range(first, wanted[task]):
                key = load_row(flat, first_row + token * head_size, buffer, kind)
                for d in range(head_size):
                    centred[d] = key[d] - mean[d]
                _project(centred, projections[head], table * bits, sums[: count * bits])
                _buckets(sums, bits, buckets[:count])
                for t in range(count):
                    # Byte by byte, the lowest first: the kernel is the same for all widths.
                    where = ((table + t) * block_size + token) * width
                    for byte in range(width):
                        stored[where + byte] = (buckets[t] >> np.uint64(8 * byte)) & np.uint64(255)
        note_codes(header, tags[task], wanted[task])


@compiled(fastmath=True)
def _cosine(query: np.ndarray, key: np.ndarray, mean: np.ndarray) -> Any:
    """Of a query with a centred key; 0 where one of them is."""
    product, own, other = np.float32(0.0), np.float32(0.0), np.float32(0.0)
    for d in range(query.shape[0]):
        centred = key[d] - mean[d]
        product += query[d] * centred
        own += query[d] * query[d]
        other += centred * centred
    return product / max(np.sqrt(own) * np.sqrt(other), _TINY)


@compiled()
def sampling_probability(cosine: float, tables: int, bits: int) -> float:
    """Of a key to share two buckets or more with a query: `MagicPig.sampling_probability`."""
    agree = 1 - math.acos(min(max(np.float64(cosine), -1.0), 1.0)) / math.pi
    hit = agree**bits
    miss = 1 - hit
    chance = 1 - miss**tables - tables * hit * miss ** (tables - 1)
    return min(max(chance, _SMALLEST), 1.0)


@compiled()
def _collide_twice(
    own: np.ndarray, stored: np.ndarray, block_size: int, once: np.ndarray, twice: np.ndarray
) -> None:
    """Which tokens share a query's bucket in two tables or more: `twice` `[tokens]`, uint8."""
    once[:], twice[:] = 0, 0
    for table in range(own.shape[0]):
        keys = stored[table * block_size : table * block_size + once.shape[0]]
        bucket = own[table]
        for t in range(once.shape[0]):
            same = np.uint8(keys[t] == bucket)
            twice[t] |= once[t] & same
            once[t] |= same


@compiled(parallel=True)
def flag_collisions(
    own: np.ndarray,
    records: np.ndarray,
    place: tuple[int, int],
    block_size: int,
    block_table: np.ndarray,
    rows: np.ndarray,
    lengths: np.ndarray,
    queries: np.ndarray,
    flags: np.ndarray,
) -> None:
    """Samples the unselected keys that share two buckets or more with a query.

    Args:
        own: `[num_queries, num_heads, L]`, unsigned, of the stored type: the queries' signatures.
        records: See `sign_keys`.
        place: Of the signatures, see the package.
        block_size: Tokens of a block.
        block_table: See the package; so `rows` and `lengths`.
        rows: Of all queries.
        lengths: Of all queries.
        queries: `[n]`, int64: which of them.
        flags: See the package; units are query heads; written.
    """
    num_heads, num_kv_heads = own.shape[1], records.shape[1]
    group = num_heads // num_kv_heads
    size = own.shape[2] * block_size * own.itemsize
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
        stored = flat_records[start : start + size].view(own.dtype)
        once, twice = np.empty(count, np.uint8), np.empty(count, np.uint8)
        for head in range(kv_head * group, (kv_head + 1) * group):
            _collide_twice(own[index, head], stored, block_size, once, twice)
            selected = flags[index * num_heads + head, first : first + count]
            for t in range(count):
                selected[t] = np.uint8(3) if twice[t] and selected[t] == 0 else selected[t]


@compiled(parallel=True)
def weigh_collisions(
    query: np.ndarray,
    elements: np.ndarray,
    kind: int,
    block_size: int,
    block_table: np.ndarray,
    rows: np.ndarray,
    lengths: np.ndarray,
    queries: np.ndarray,
    tables: int,
    bits: int,
    places: np.ndarray,
    means: np.ndarray,
    flags: np.ndarray,
    key_probability: np.ndarray,
    scored: np.ndarray,
) -> None:
    """The probabilities of sampled keys, each of which is loaded once for a group's query heads.

    Args:
        query: `[num_queries, num_heads, head_size]`, float32.
        elements: See the package; so the next five.
        kind: Of the elements.
        block_size: Tokens of a block.
        block_table: Of the batch.
        rows: Of all queries.
        lengths: Of all queries.
        queries: `[n]`, int64: which of them.
        tables: L.
        bits: Of a table.
        places: `[num_queries]`, int64: of their means.
        means: See `sign_keys`.
        flags: See the package; units are query heads.
        key_probability: `[num_queries * num_heads, capacity]`, float32; written for flag 3.
        scored: `[n, num_kv_heads, blocks]`, int32: how many keys were loaded; written up to the
            queries' last blocks.
    """
    _, num_heads, head_size = query.shape
    num_kv_heads = elements.shape[1]
    group, flat = num_heads // num_kv_heads, elements.reshape(-1)
    chunks = chunks_of(queries, lengths, block_size)
    for item in prange(queries.shape[0] * num_kv_heads * chunks):
        which, run = item // (num_kv_heads * chunks), item % (num_kv_heads * chunks)
        chunk, kv_head = run // num_kv_heads, run % num_kv_heads
        index = queries[which]
        first = chunk * block_size
        count = min(block_size, lengths[index] - first)
        if count <= 0:
            continue
        start = first_key(elements, block_table[rows[index], chunk], kv_head, block_size, head_size)
        mean = means[places[index], kv_head * head_size : (kv_head + 1) * head_size]
        head = kv_head * group
        unit = index * num_heads + head
        buffer = np.empty(head_size, np.float32)
        loaded = 0
        for t in range(first, first + count):
            is_sampled = False
            for h in range(group):
                is_sampled |= flags[unit + h, t] == 3
            if not is_sampled:
                continue
            loaded += 1
            key = load_row(flat, start + (t - first) * head_size, buffer, kind)
            for h in range(group):
                if flags[unit + h, t] == 3:
                    cosine = _cosine(query[index, head + h], key, mean)
                    key_probability[unit + h, t] = sampling_probability(cosine, tables, bits)
        scored[which, kv_head, chunk] = loaded
