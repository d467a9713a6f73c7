"""A tile's keys against the query heads of a group, and its values summed with their weights.

The two inner loops of attention. Each loaded row serves all query heads of the group; a token's
score is summed in the same order whatever is beside it.

Four heads at once and one at a time are written out: one loop with a branch for the other three
took 25 ns instead of 19 for a key of 128 float32s, and 20 instead of 12 for a value in bfloat16.
"""

from __future__ import annotations

import numpy as np
from numba import njit

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


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def padded(head_size: int) -> int:
    """Elements of a row of whole vectors."""
    return (head_size + LANES - 1) // LANES * LANES


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
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


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
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
        h = 0
        while h + 4 <= heads:
            at = h * width
            sum_a, sum_b, sum_c, sum_d = zero, zero, zero, zero
            for d in range(0, head_size, LANES):
                key = load_part(elements, row + d, kind, head_size - d)
                sum_a = multiply_add(load(query, at + d, 0), key, sum_a)
                sum_b = multiply_add(load(query, at + width + d, 0), key, sum_b)
                sum_c = multiply_add(load(query, at + 2 * width + d, 0), key, sum_c)
                sum_d = multiply_add(load(query, at + 3 * width + d, 0), key, sum_d)
            scores[h, column + i] = total(sum_a)
            scores[h + 1, column + i] = total(sum_b)
            scores[h + 2, column + i] = total(sum_c)
            scores[h + 3, column + i] = total(sum_d)
            h += 4
        while h < heads:
            at = h * width
            sum_a = zero
            for d in range(0, head_size, LANES):
                key = load_part(elements, row + d, kind, head_size - d)
                sum_a = multiply_add(load(query, at + d, 0), key, sum_a)
            scores[h, column + i] = total(sum_a)
            h += 1


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
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
    for d in range(0, head_size, 2 * LANES):
        left = head_size - d
        has_two = left > LANES
        h = 0
        while h + 4 <= heads:
            at = h * width + d
            a0, b0 = load(sums, at, 0), load(sums, at + width, 0)
            c0, d0 = load(sums, at + 2 * width, 0), load(sums, at + 3 * width, 0)
            if has_two:
                more = at + LANES
                a1, b1 = load(sums, more, 0), load(sums, more + width, 0)
                c1, d1 = load(sums, more + 2 * width, 0), load(sums, more + 3 * width, 0)
                for i in range(count):
                    fetch(elements, next_rows[i] + d)
                    fetch(elements, next_rows[i] + d + LANES)
                    v0 = load(elements, values[i] + d, kind)
                    v1 = load_part(elements, values[i] + d + LANES, kind, left - LANES)
                    f = splat(factors[h, i])
                    a0, a1 = multiply_add(f, v0, a0), multiply_add(f, v1, a1)
                    f = splat(factors[h + 1, i])
                    b0, b1 = multiply_add(f, v0, b0), multiply_add(f, v1, b1)
                    f = splat(factors[h + 2, i])
                    c0, c1 = multiply_add(f, v0, c0), multiply_add(f, v1, c1)
                    f = splat(factors[h + 3, i])
                    d0, d1 = multiply_add(f, v0, d0), multiply_add(f, v1, d1)
                store(sums, more, a1)
                store(sums, more + width, b1)
                store(sums, more + 2 * width, c1)
                store(sums, more + 3 * width, d1)
            else:
                for i in range(count):
                    v0 = load_part(elements, values[i] + d, kind, left)
                    a0 = multiply_add(splat(factors[h, i]), v0, a0)
                    b0 = multiply_add(splat(factors[h + 1, i]), v0, b0)
                    c0 = multiply_add(splat(factors[h + 2, i]), v0, c0)
                    d0 = multiply_add(splat(factors[h + 3, i]), v0, d0)
            store(sums, at, a0)
            store(sums, at + width, b0)
            store(sums, at + 2 * width, c0)
            store(sums, at + 3 * width, d0)
            h += 4
        while h < heads:
            at = h * width + d
            a0 = load(sums, at, 0)
            if has_two:
                a1 = load(sums, at + LANES, 0)
                for i in range(count):
                    f = splat(factors[h, i])
                    a0 = multiply_add(f, load(elements, values[i] + d, kind), a0)
                    v1 = load_part(elements, values[i] + d + LANES, kind, left - LANES)
                    a1 = multiply_add(f, v1, a1)
                store(sums, at + LANES, a1)
            else:
                for i in range(count):
                    v0 = load_part(elements, values[i] + d, kind, left)
                    a0 = multiply_add(splat(factors[h, i]), v0, a0)
            store(sums, at, a0)
            h += 1
