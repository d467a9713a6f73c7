"""Decode attention over lists of tokens: it reads those rows of the cache, and no others.

One pass per list with a running maximum (Milakov and Gimelshein 2018, "Online normalizer
calculation for softmax"); long lists are split, so that one long row keeps all cores busy, and the
parts joined by their maxima (Flash-Decoding).
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit, prange

from vllm_sparse_plugin.paged.kernels.exponential import exp_in_place
from vllm_sparse_plugin.paged.kernels.prefetch import prefetch
from vllm_sparse_plugin.paged.kernels.rows import load_row

_TILE = 32
"""Tokens whose scores are held at once: their rows stay in the first-level cache."""
_NOTHING = np.float32(-1e30)


@njit(parallel=True, fastmath=True, nogil=True, cache=True)  # type: ignore[untyped-decorator]
def attend_lists(
    query: np.ndarray,
    elements: np.ndarray,
    kind: int,
    block_size: int,
    block_table: np.ndarray,
    rows: np.ndarray,
    tokens: np.ndarray,
    log_weights: np.ndarray,
    counts: np.ndarray,
    scaling: float,
    splits: int,
    output: np.ndarray,
) -> None:
    """`sum_S (exp(s_i) / p_i) v_i / sum_S (exp(s_i) / p_i)` for every unit's list S.

    Args:
        query: `[num_queries, num_heads, head_size]`, float32.
        elements: See the package; so `kind`, `block_table` and `rows`.
        kind: Of the elements.
        block_size: Tokens of a block.
        block_table: `[num_rows, max_blocks]`.
        rows: `[num_queries]`.
        tokens: `[num_queries * num_units, capacity]`, int32 positions; with capacity 0, every unit
            reads the positions before its count.
        log_weights: -log of their probabilities, float32, of the same shape; with capacity 0, all
            are 1.
        counts: `[num_queries * num_units]`, tokens of each list.
        scaling: Of the scores.
        splits: Parts that each list is cut into.
        output: `[num_queries, num_heads, head_size]`, float32; zeros for an empty list.
    """
    num_queries, num_heads, head_size = query.shape
    num_units = counts.shape[0] // num_queries
    heads = num_heads // num_units
    group = num_heads // elements.shape[1]
    value_start = block_size * head_size
    is_range = tokens.shape[1] == 0
    is_weighted = log_weights.shape[1] > 0
    scale = np.float32(scaling)
    top = np.empty((counts.shape[0], splits, heads), np.float32)
    mass = np.empty((counts.shape[0], splits, heads), np.float32)
    sums = np.empty((counts.shape[0], splits, heads, head_size), np.float32)
    for item in prange(counts.shape[0] * splits):
        unit, split = item // splits, item % splits
        index = unit // num_units
        first_head = unit % num_units * heads
        kv_head = first_head // group
        blocks = block_table[rows[index]]
        q = query[index, first_head : first_head + heads]
        count = counts[unit]
        share = (count + splits - 1) // splits
        begin, end = split * share, min(count, (split + 1) * share)
        places = np.empty(_TILE, np.int64)
        starts = np.empty(_TILE, np.int64)
        scores = np.empty((heads, _TILE), np.float32)
        powers = np.empty(_TILE, np.int32)
        buffer = np.empty(head_size, np.float32)
        total = np.zeros((heads, head_size), np.float32)
        largest = np.full(heads, _NOTHING, np.float32)
        weight = np.zeros(heads, np.float32)
        for tile in range(begin, end, _TILE):
            filled = min(_TILE, end - tile)
            for i in range(filled):
                token = tile + i if is_range else np.int64(tokens[unit, tile + i])
                places[i] = blocks[token // block_size]
                starts[i] = token % block_size * head_size
                prefetch(elements, places[i], kv_head, starts[i], head_size)
            for i in range(filled):
                prefetch(elements, places[i], kv_head, value_start + starts[i], head_size)
                key = load_row(elements, places[i], kv_head, starts[i], buffer, kind)
                for h in range(heads):
                    score = np.float32(0.0)
                    for d in range(head_size):
                        score += q[h, d] * key[d]
                    scores[h, i] = score * scale
            if is_weighted:
                for h in range(heads):
                    for i in range(filled):
                        scores[h, i] += log_weights[unit, tile + i]
            for h in range(heads):
                row = scores[h]
                peak = largest[h]
                for i in range(filled):
                    peak = max(peak, row[i])
                if peak > largest[h]:
                    shrink = np.float32(math.exp(largest[h] - peak))
                    largest[h] = peak
                    weight[h] *= shrink
                    for d in range(head_size):
                        total[h, d] *= shrink
                for i in range(filled):
                    row[i] -= peak
                exp_in_place(row, powers, filled)
                for i in range(filled):
                    weight[h] += row[i]
            for i in range(filled):
                value = load_row(
                    elements, places[i], kv_head, value_start + starts[i], buffer, kind
                )
                for h in range(heads):
                    factor = scores[h, i]
                    for d in range(head_size):
                        total[h, d] += factor * value[d]
        top[unit, split] = largest
        mass[unit, split] = weight
        sums[unit, split] = total
    for unit in prange(counts.shape[0]):
        index = unit // num_units
        for h in range(heads):
            peak = _NOTHING
            for split in range(splits):
                peak = max(peak, top[unit, split, h])
            result = output[index, unit % num_units * heads + h]
            result[:] = np.float32(0.0)
            weight_sum = np.float32(0.0)
            for split in range(splits):
                factor = np.float32(math.exp(top[unit, split, h] - peak))
                weight_sum += factor * mass[unit, split, h]
                for d in range(head_size):
                    result[d] += factor * sums[unit, split, h, d]
            if weight_sum > 0:
                for d in range(head_size):
                    result[d] /= weight_sum
