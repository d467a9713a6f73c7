"""Decode attention over lists of tokens: it reads those rows of the cache, and no others.

One pass per list with a running maximum (Milakov and Gimelshein 2018, "Online normalizer
calculation for softmax"); long lists are split, so that one long row keeps all cores busy, and the
parts joined by their maxima (Flash-Decoding).
"""

from __future__ import annotations

import math

import numpy as np
from numba import prange

from vllm_sparse_plugin.paged.kernels.compiled import compiled
from vllm_sparse_plugin.paged.kernels.exponential import exp_in_place
from vllm_sparse_plugin.paged.kernels.group_lists import NOT_SELECTED
from vllm_sparse_plugin.paged.kernels.rows import copy_row
from vllm_sparse_plugin.paged.kernels.tile_products import (
    add_values,
    pad_queries,
    padded,
    score_tile,
)
from vllm_sparse_plugin.paged.kernels.tiles import PART, TILE, fetch_rows, locate

_NOTHING = np.float32(-1e30)
_LARGEST_EXPONENT = np.float32(80.0)


@compiled(parallel=True, fastmath=True)
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
    output: np.ndarray,
    sink_logits: np.ndarray,
) -> None:
    """`sum_S (exp(s_i) / p_i) v_i / sum_S (exp(s_i) / p_i)` for every query head's selection S.

    Args:
        query: `[num_queries, num_heads, head_size]`, float32.
        elements: See the package; so `kind`, `block_table` and `rows`.
        kind: Of the elements.
        block_size: Tokens of a block.
        block_table: `[num_rows, max_blocks]`.
        rows: `[num_queries]`.
        tokens: `[num_queries * num_kv_heads, capacity]`, int32 positions; with capacity 0, every
            KV head reads the positions before its count.
        log_weights: `[num_queries * num_kv_heads, capacity, heads of a group]`, float32, see
            `group_lists`, or `[..., 1]` for all heads of the group; with capacity 0, every query
            head of a group reads all tokens of its KV head's list, with weight 1.
        counts: `[num_queries * num_kv_heads]`, tokens of each list.
        scaling: Of the scores.
        output: `[num_queries, num_heads, head_size]`, float32; zeros for an empty selection.
        sink_logits: `[num_heads]`, float32, of learned attention sinks: each adds its exponential
            to the denominator; `[0]` = the layer has none.
    """
    _, num_heads, head_size = query.shape
    num_kv_heads = elements.shape[1]
    heads = num_heads // num_kv_heads
    value_start = block_size * head_size
    is_weighted = log_weights.shape[1] > 0
    scale = np.float32(scaling)
    longest = 0
    for unit in range(counts.shape[0]):
        longest = max(longest, counts[unit])
    splits = max(1, (longest + PART - 1) // PART)
    top = np.empty((counts.shape[0], splits, heads), np.float32)
    mass = np.empty((counts.shape[0], splits, heads), np.float32)
    sums = np.empty((counts.shape[0], splits, heads, head_size), np.float32)
    for item in prange(counts.shape[0] * splits):
        unit, split = item // splits, item % splits
        index, kv_head = unit // num_kv_heads, unit % num_kv_heads
        blocks = block_table[rows[index]]
        count = counts[unit]
        begin, end = split * PART, min(count, (split + 1) * PART)
        if begin >= end:  # a shorter list than the longest; nobody reads this part
            continue
        q = np.empty((heads, padded(head_size)), np.float32)
        pad_queries(query[index], kv_head * heads, q)
        keys = np.empty((2, TILE), np.int64)  # of this tile, and of the next one
        values = np.empty(TILE, np.int64)
        scores = np.empty((heads, TILE), np.float32)
        total = np.zeros((heads, q.shape[1]), np.float32)
        largest = np.full(heads, _NOTHING, np.float32)
        weight = np.zeros(heads, np.float32)
        filled = locate(
            tokens, unit, begin, end, elements, blocks, kv_head, block_size, head_size, keys[0]
        )
        fetch_rows(elements, keys[0], filled, head_size)
        side = 0
        for tile in range(begin, end, TILE):
            own, following = keys[side], keys[1 - side]
            side = 1 - side
            for i in range(filled):
                values[i] = own[i] + value_start
            score_tile(q, elements, kind, own, filled, head_size, scores, 0, values)
            ahead = locate(
                tokens,
                unit,
                tile + TILE,
                end,
                elements,
                blocks,
                kv_head,
                block_size,
                head_size,
                following,
            )
            for h in range(heads):
                row = scores[h]
                own_weight = min(h, log_weights.shape[2] - 1)
                peak, factor = largest[h], scale
                if is_weighted:
                    factor = np.float32(1.0)
                    for i in range(filled):
                        row[i] = row[i] * scale + log_weights[unit, tile + i, own_weight]
                for i in range(filled):
                    peak = max(peak, row[i] * factor)
                if peak > largest[h]:
                    shrink = np.float32(math.exp(largest[h] - peak))
                    largest[h] = peak
                    weight[h] *= shrink
                    for d in range(total.shape[1]):
                        total[h, d] *= shrink
                mass_of_tile = exp_in_place(row, filled, factor, peak)
                if is_weighted:
                    mass_of_tile = np.float32(0.0)
                    for i in range(filled):
                        if log_weights[unit, tile + i, own_weight] == NOT_SELECTED:
                            row[i] = np.float32(0.0)
                        mass_of_tile += row[i]
                weight[h] += mass_of_tile
            add_values(scores, elements, kind, values, filled, head_size, total, following)
            filled = ahead
        for h in range(heads):
            top[unit, split, h], mass[unit, split, h] = largest[h], weight[h]
            copy_row(total[h, :head_size], sums[unit, split, h])
    for unit in prange(counts.shape[0]):
        index, kv_head = unit // num_kv_heads, unit % num_kv_heads
        parts = (counts[unit] + PART - 1) // PART
        for h in range(heads):
            peak = _NOTHING
            for split in range(parts):
                peak = max(peak, top[unit, split, h])
            result = output[index, kv_head * heads + h]
            result[:] = np.float32(0.0)
            weight_sum = np.float32(0.0)
            for split in range(parts):
                factor = np.float32(math.exp(top[unit, split, h] - peak))
                weight_sum += factor * mass[unit, split, h]
                for d in range(head_size):
                    result[d] += factor * sums[unit, split, h, d]
            if len(sink_logits):  # (fastmath knows no infinity: beyond this all is zero anyhow)
                above = min(sink_logits[kv_head * heads + h] - peak, _LARGEST_EXPONENT)
                weight_sum += np.float32(math.exp(above))
            if weight_sum > 0:
                for d in range(head_size):
                    result[d] /= weight_sum
