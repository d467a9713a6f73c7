"""A tile's keys against the query heads of a group, and its values summed with their weights.

The two inner loops of attention. Each loaded row serves all query heads of the group; a token's
score is summed in the same order whatever is beside it.

Four heads go at once; where two or three are left, the last one takes the others' places, which
computes the same sums again. A single head is written out: one loop with a branch for the other
three took 25 ns instead of 19 for a key of 128 float32s, and 20 instead of 12 for a value in
bfloat16.
"""

from __future__ import annotations

import numpy as np

from vllm_sparse_plugin.paged.kernels.compiled import compiled
from vllm_sparse_plugin.paged.kernels.vectors import (
    LANES,
    fetch,
    load,
    load_part,
    multiply_add,
    splat,
    store,
    total,
)


@compiled()
def padded(head_size: int) -> int:
    """Elements of a row of whole vectors."""
    return (head_size + LANES - 1) // LANES * LANES


@compiled()
def pad_queries(query: np.ndarray, first: int, rows: np.ndarray) -> None:
    """Copies the queries of a group of heads, with zeros up to whole vectors.

    Args:
        query: `[num_heads, head_size]`, float32.
        first: Query head of the group.
        rows: `[heads, padded(head_size)]`, float32; written.
    """
    head_size = query.shape[1]
    for h in range(rows.shape[0]):
        for d in range(head_size):
            rows[h, d] = query[first + h, d]
        for d in range(head_size, rows.shape[1]):
            rows[h, d] = np.float32(0.0)


@compiled()
def score_tile(
    query: np.ndarray,
    elements: np.ndarray,
    kind: int,
    keys: np.ndarray,
    count: int,
    head_size: int,
    scores: np.ndarray,
    column: int,
    next_rows: np.ndarray,
) -> None:
    """Dot products of some keys with the queries of a group.

    Args:
        query: `[heads, padded]`, see `pad_queries`.
        elements: See the package.
        kind: Of the elements.
        keys: int64: first elements of the keys' rows, counted from the cache's start.
        count: How many keys.
        head_size: Channels of a key.
        scores: `[heads, width]`, float32, C-contiguous; columns from `column` on are written.
        column: The first key's.
        next_rows: int64, at least `count`: first elements of rows that are wanted next.
    """
    heads, width = query.shape
    zero = splat(np.float32(0.0))
    for i in range(count):  # a row at a time: processors foresee the rest of a single row best
        row, next_row = keys[i], next_rows[i]
        for d in range(0, head_size, LANES):
            fetch(elements, next_row + d)
        for h in range(0, heads, 4):
            if h + 1 < heads:
                a, b = h, h + 1
                c, d = min(h + 2, heads - 1), min(h + 3, heads - 1)
                sum_a, sum_b, sum_c, sum_d = zero, zero, zero, zero
                for x in range(0, head_size, LANES):
                    key = load_part(elements, row + x, kind, head_size - x)
                    sum_a = multiply_add(load(query, a * width + x, 0), key, sum_a)
                    sum_b = multiply_add(load(query, b * width + x, 0), key, sum_b)
                    sum_c = multiply_add(load(query, c * width + x, 0), key, sum_c)
                    sum_d = multiply_add(load(query, d * width + x, 0), key, sum_d)
                scores[a, column + i] = total(sum_a)
                scores[b, column + i] = total(sum_b)
                scores[c, column + i] = total(sum_c)
                scores[d, column + i] = total(sum_d)
            else:
                sum_a = zero
                for x in range(0, head_size, LANES):
                    key = load_part(elements, row + x, kind, head_size - x)
                    sum_a = multiply_add(load(query, h * width + x, 0), key, sum_a)
                scores[h, column + i] = total(sum_a)


@compiled(inline=True)
def _add_to_four(
    factors: np.ndarray,
    elements: np.ndarray,
    kind: int,
    values: np.ndarray,
    count: int,
    x: int,
    h: int,
    sums: np.ndarray,
    next_rows: np.ndarray,
) -> None:
    """Four vectors of values, from channel `x` on, for four query heads from `h` on.

    All sixteen sums stay in registers, and each value is read once.
    """
    heads, width = sums.shape
    c, d = min(h + 2, heads - 1), min(h + 3, heads - 1)
    at_a, at_b, at_c, at_d = h * width + x, (h + 1) * width + x, c * width + x, d * width + x
    a0, a1, a2, a3 = (
        load(sums, at_a, 0),
        load(sums, at_a + LANES, 0),
        load(sums, at_a + 2 * LANES, 0),
        load(sums, at_a + 3 * LANES, 0),
    )
    b0, b1, b2, b3 = (
        load(sums, at_b, 0),
        load(sums, at_b + LANES, 0),
        load(sums, at_b + 2 * LANES, 0),
        load(sums, at_b + 3 * LANES, 0),
    )
    c0, c1, c2, c3 = (
        load(sums, at_c, 0),
        load(sums, at_c + LANES, 0),
        load(sums, at_c + 2 * LANES, 0),
        load(sums, at_c + 3 * LANES, 0),
    )
    d0, d1, d2, d3 = (
        load(sums, at_d, 0),
        load(sums, at_d + LANES, 0),
        load(sums, at_d + 2 * LANES, 0),
        load(sums, at_d + 3 * LANES, 0),
    )
    for i in range(count):
        if h == 0:
            for ahead in range(0, 4 * LANES, LANES):
                fetch(elements, next_rows[i] + x + ahead)
        start = values[i] + x
        v0, v1 = load(elements, start, kind), load(elements, start + LANES, kind)
        v2, v3 = load(elements, start + 2 * LANES, kind), load(elements, start + 3 * LANES, kind)
        f = splat(factors[h, i])
        a0, a1 = multiply_add(f, v0, a0), multiply_add(f, v1, a1)
        a2, a3 = multiply_add(f, v2, a2), multiply_add(f, v3, a3)
        f = splat(factors[h + 1, i])
        b0, b1 = multiply_add(f, v0, b0), multiply_add(f, v1, b1)
        b2, b3 = multiply_add(f, v2, b2), multiply_add(f, v3, b3)
        f = splat(factors[c, i])
        c0, c1 = multiply_add(f, v0, c0), multiply_add(f, v1, c1)
        c2, c3 = multiply_add(f, v2, c2), multiply_add(f, v3, c3)
        f = splat(factors[d, i])
        d0, d1 = multiply_add(f, v0, d0), multiply_add(f, v1, d1)
        d2, d3 = multiply_add(f, v2, d2), multiply_add(f, v3, d3)
    store(sums, at_a, a0)
    store(sums, at_a + LANES, a1)
    store(sums, at_a + 2 * LANES, a2)
    store(sums, at_a + 3 * LANES, a3)
    store(sums, at_b, b0)
    store(sums, at_b + LANES, b1)
    store(sums, at_b + 2 * LANES, b2)
    store(sums, at_b + 3 * LANES, b3)
    store(sums, at_c, c0)
    store(sums, at_c + LANES, c1)
    store(sums, at_c + 2 * LANES, c2)
    store(sums, at_c + 3 * LANES, c3)
    store(sums, at_d, d0)
    store(sums, at_d + LANES, d1)
    store(sums, at_d + 2 * LANES, d2)
    store(sums, at_d + 3 * LANES, d3)


@compiled(inline=True)
def _add_part_to_four(
    factors: np.ndarray,
    elements: np.ndarray,
    kind: int,
    values: np.ndarray,
    count: int,
    x: int,
    left: int,
    h: int,
    sums: np.ndarray,
    next_rows: np.ndarray,
) -> None:
    """The same for one vector, of which `left` channels are in use."""
    heads, width = sums.shape
    c, d = min(h + 2, heads - 1), min(h + 3, heads - 1)
    at_a, at_b, at_c, at_d = h * width + x, (h + 1) * width + x, c * width + x, d * width + x
    sum_a, sum_b = load(sums, at_a, 0), load(sums, at_b, 0)
    sum_c, sum_d = load(sums, at_c, 0), load(sums, at_d, 0)
    for i in range(count):
        if h == 0:
            fetch(elements, next_rows[i] + x)
        v = load_part(elements, values[i] + x, kind, left)
        sum_a = multiply_add(splat(factors[h, i]), v, sum_a)
        sum_b = multiply_add(splat(factors[h + 1, i]), v, sum_b)
        sum_c = multiply_add(splat(factors[c, i]), v, sum_c)
        sum_d = multiply_add(splat(factors[d, i]), v, sum_d)
    store(sums, at_a, sum_a)
    store(sums, at_b, sum_b)
    store(sums, at_c, sum_c)
    store(sums, at_d, sum_d)


@compiled()
def add_values(
    factors: np.ndarray,
    elements: np.ndarray,
    kind: int,
    values: np.ndarray,
    count: int,
    head_size: int,
    sums: np.ndarray,
    next_rows: np.ndarray,
) -> None:
    """Adds some values, each times its factor, to the sum of each query head.

    Args:
        factors: `[heads, width]`, float32: a tile's, from column 0 on.
        elements: See the package.
        kind: Of the elements.
        values: int64: first elements of the values' rows, counted from the cache's start.
        count: How many values.
        head_size: Channels of a value.
        sums: `[heads, padded(head_size)]`, float32; added to.
        next_rows: See `score_tile`.
    """
    heads, width = sums.shape
    for h in range(0, heads, 4):
        if h + 1 < heads:
            x = 0
            while x + 4 * LANES <= head_size:
                _add_to_four(factors, elements, kind, values, count, x, h, sums, next_rows)
                x += 4 * LANES
            while x < head_size:
                left = head_size - x
                _add_part_to_four(
                    factors, elements, kind, values, count, x, left, h, sums, next_rows
                )
                x += LANES
        else:
            for x in range(0, head_size, LANES):
                total_a = load(sums, h * width + x, 0)
                for i in range(count):
                    if h == 0:
                        fetch(elements, next_rows[i] + x)
                    v = load_part(elements, values[i] + x, kind, head_size - x)
                    total_a = multiply_add(splat(factors[h, i]), v, total_a)
                store(sums, h * width + x, total_a)
