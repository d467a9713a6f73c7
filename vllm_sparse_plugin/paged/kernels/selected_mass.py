"""The softmax denominator of what is selected: what a sampler measures its error against."""

from __future__ import annotations

import math

import numpy as np
from numba import prange

from vllm_sparse_plugin.paged.kernels.compiled import compiled
from vllm_sparse_plugin.paged.kernels.exponential import exp_in_place
from vllm_sparse_plugin.paged.kernels.group_lists import NOT_SELECTED
from vllm_sparse_plugin.paged.kernels.tile_products import pad_queries, padded, score_tile
from vllm_sparse_plugin.paged.kernels.tiles import PART, TILE, fetch_rows, locate


@compiled(parallel=True, fastmath=True)
def sum_selected_mass(
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
    top: np.ndarray,
    mass: np.ndarray,
) -> None:
    """`sum_S exp(s_i) / p_i` over each query head's selection S, by parts of its list.

    Args:
        query: `[num_queries, num_heads, head_size]`, float32.
        elements: See the package; so the next four.
        kind: Of the elements.
        block_size: Tokens of a block.
        block_table: Of the batch.
        rows: Of the queries.
        tokens: `[num_queries * num_kv_heads, capacity]`, int32 positions.
        log_weights: `[num_queries * num_kv_heads, capacity, heads of a group]`, float32, see
            `group_lists`, or `[..., 1]` for all heads of the group; with capacity 0, every query
            head of a group has selected all tokens of its KV head's list, for certain.
        counts: `[num_queries * num_kv_heads]`, tokens of each list.
        scaling: Of the scores.
        top: `[num_queries * num_heads, parts]`, float32, largest log term of a part of `PART`
            tokens; written.
        mass: float64, likewise: the part's sum, divided by `exp(top)`; written.
    """
    _, num_heads, head_size = query.shape
    num_kv_heads = elements.shape[1]
    heads = num_heads // num_kv_heads
    parts = top.shape[1]
    is_weighted = log_weights.shape[1] > 0
    scale = np.float32(scaling)
    for item in prange(counts.shape[0] * parts):
        unit, part = item // parts, item % parts
        index, kv_head = unit // num_kv_heads, unit % num_kv_heads
        blocks = block_table[rows[index]]
        q = np.empty((heads, padded(head_size)), np.float32)
        pad_queries(query[index], kv_head * heads, q)
        begin, end = part * PART, min(counts[unit], (part + 1) * PART)
        keys = np.empty((2, TILE), np.int64)  # of this tile, and of the next one
        terms = np.empty((heads, TILE), np.float32)
        largest = np.full(heads, NOT_SELECTED, np.float32)
        total = np.zeros(heads, np.float64)
        filled = locate(
            tokens, unit, begin, end, elements, blocks, kv_head, block_size, head_size, keys[0]
        )
        fetch_rows(elements, keys[0], filled, head_size)
        side = 0
        for tile in range(begin, end, TILE):
            own, following = keys[side], keys[1 - side]
            side = 1 - side
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
            score_tile(q, elements, kind, own, filled, head_size, terms, 0, following)
            for h in range(heads):
                row = terms[h]
                own_weight = min(h, log_weights.shape[2] - 1)
                peak = largest[h]
                for i in range(filled):
                    row[i] *= scale
                if is_weighted:
                    for i in range(filled):
                        row[i] += log_weights[unit, tile + i, own_weight]
                for i in range(filled):
                    peak = max(peak, row[i])
                total[h] *= math.exp(largest[h] - peak)
                largest[h] = peak
                exp_in_place(row, filled, 1.0, peak)
                if is_weighted:
                    for i in range(filled):
                        if log_weights[unit, tile + i, own_weight] == NOT_SELECTED:
                            row[i] = np.float32(0.0)
                for i in range(filled):
                    total[h] += row[i]
            filled = ahead
        first = index * num_heads + kv_head * heads
        for h in range(heads):
            top[first + h, part] = largest[h]
            mass[first + h, part] = total[h]
