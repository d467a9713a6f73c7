"""The samples of the sampling maskers, marked in the flags of query heads or of KV heads.

Units that are KV heads have the numbers of their first query heads.
"""

from __future__ import annotations

import math

import numpy as np
from numba import prange

from vllm_sparse_plugin.paged.kernels.compiled import compiled
from vllm_sparse_plugin.paged.kernels.counter_random import stream_of
from vllm_sparse_plugin.paged.kernels.exponential import exp_in_place
from vllm_sparse_plugin.paged.kernels.random_order import count_unselected, draw, smallest
from vllm_sparse_plugin.paged.kernels.tile_products import pad_queries, padded, score_tile
from vllm_sparse_plugin.paged.kernels.tiles import TILE, fetch_rows, locate

_AHEAD = 16
"""Keys that are asked for before their turn."""
_FIRST_DRAW = 4
"""Keys drawn at first, in base samples: most often the whole sample is among them."""
_TINY = np.finfo(np.float64).tiny


@compiled(parallel=True)
def sample_share(
    share: float,
    seed: int,
    layer: int,
    num_heads: int,
    lengths: np.ndarray,
    flags: np.ndarray,
    probability: np.ndarray,
) -> None:
    """Samples a share of each unit's unselected keys, at least one.

    Args:
        share: In (0, 1].
        seed: Of the numbers.
        layer: Index of the attention layer.
        num_heads: Query heads.
        lengths: `[num_queries]`.
        flags: See the package; written.
        probability: `[num_queries * num_units]`, float32; written.
    """
    num_units = flags.shape[0] // lengths.shape[0]
    for unit in prange(flags.shape[0]):
        length, row = np.int64(lengths[unit // num_units]), flags[unit]
        unselected = count_unselected(row, length)
        if unselected == 0:
            continue
        wanted = min(unselected, max(1, int(unselected * share)))
        keys, numbers = np.empty(length, np.int32), np.empty(length, np.uint64)
        head = unit % num_units * (num_heads // num_units)
        stream = stream_of(seed, layer, head, length - 1)
        drawn = draw(row, length, stream, unselected, wanted, keys, numbers)
        chosen = np.empty(drawn, np.bool_)
        smallest(numbers, drawn, wanted, chosen)
        _flag_chosen(keys, chosen, drawn, row)
        probability[unit] = wanted / unselected


@compiled()
def _flag_chosen(keys: np.ndarray, chosen: np.ndarray, count: int, flags: np.ndarray) -> None:
    """Flags the chosen ones of the first `count` keys, none of which is selected yet."""
    for i in range(count):
        # Written always: no branch that the processor could guess wrong.
        flags[keys[i]] = np.uint8(2) * chosen[i]


@compiled(fastmath=True)
def _sum(values: np.ndarray) -> float:
    total = 0.0
    for i in range(values.shape[0]):
        total += np.float64(values[i])
    return total


@compiled(fastmath=True)
def _sum_of_squares(values: np.ndarray, mean: float) -> float:
    total = 0.0
    for i in range(values.shape[0]):
        total += (np.float64(values[i]) - mean) ** 2
    return total


@compiled()
def _score_keys(
    query: np.ndarray,
    first: int,
    elements: np.ndarray,
    kind: int,
    block_size: int,
    blocks: np.ndarray,
    kv_head: int,
    tokens: np.ndarray,
    scaling: float,
    scores: np.ndarray,
) -> None:
    """Scaled scores of some keys for query heads of one group; each key is loaded once.

    Args:
        query: `[num_heads, head_size]`, float32.
        first: Query head.
        elements: See the package.
        kind: Of the elements.
        block_size: Tokens of a block.
        blocks: Of the sequence.
        kv_head: Whose keys.
        tokens: `[1, count]`, int32 positions; at least one.
        scaling: Of the scores.
        scores: `[heads, count]`, float32; written.
    """
    heads, count = scores.shape
    head_size = query.shape[1]
    q = np.empty((heads, padded(head_size)), np.float32)
    pad_queries(query, first, q)
    rows = np.empty(count + _AHEAD, np.int64)
    for begin in range(0, count, TILE):
        own = rows[begin:]
        locate(tokens, 0, begin, count, elements, blocks, kv_head, block_size, head_size, own)
    rows[count:] = rows[count - 1]
    fetch_rows(elements, rows, _AHEAD, head_size)
    score_tile(q, elements, kind, rows, count, head_size, scores, 0, rows[_AHEAD:])
    for h in range(heads):
        for i in range(count):
            scores[h, i] *= np.float32(scaling)


@compiled()
def budget_of(
    base_mass: np.ndarray, static: float, unselected: int, epsilon: float, quantile: float
) -> int:
    """Keys to sample beyond the base sample: the formula of `AdaptiveSamplingMasker`.

    Args:
        base_mass: `exp(score)` of the base sample, float32, up to a factor.
        static: The denominator of what was selected before, up to the same factor.
        unselected: Keys that were not, the base sample's among them.
        epsilon: Tolerated relative error.
        quantile: Of the normal distribution.
    """
    size = base_mass.shape[0]
    rest = unselected - size
    mean = _sum(base_mass) / max(1, size)
    deviation = math.sqrt(_sum_of_squares(base_mass, mean) / max(1, size - 1))
    tolerated = max(epsilon * (static + mean * unselected), _TINY)
    wanted = (quantile * deviation * rest / tolerated) ** 2
    # Without replacement: the variance falls to 0 as the sample takes everything.
    corrected = wanted / (1 + wanted / max(1, rest))
    budget: int = min(max(math.ceil(corrected), size), rest)
    return budget


@compiled(parallel=True)
def sample_adaptively(
    query: np.ndarray,
    elements: np.ndarray,
    kind: int,
    block_size: int,
    block_table: np.ndarray,
    rows: np.ndarray,
    lengths: np.ndarray,
    scaling: float,
    base_keys: int,
    base_share: float,
    epsilon: float,
    quantile: float,
    seed: int,
    layer: int,
    top: np.ndarray,
    mass: np.ndarray,
    flags: np.ndarray,
    probability: np.ndarray,
    base_sizes: np.ndarray,
) -> None:
    """Selects a base sample for each unit, and samples as many keys as its query heads ask for.

    Args:
        query: `[num_queries, num_heads, head_size]`, float32.
        elements: See the package; so the next five.
        kind: Of the elements.
        block_size: Tokens of a block.
        block_table: Of the batch.
        rows: Of the queries.
        lengths: Of the queries.
        scaling: Of the scores.
        base_keys: Of the base sample; 0 = by `base_share`.
        base_share: Of the unselected keys, at least 2 keys.
        epsilon: Tolerated relative error of the denominator.
        quantile: Of the normal distribution, for the probability of a larger one.
        seed: Of the numbers.
        layer: Index of the attention layer.
        top: What query heads have selected, see `sum_selected_mass`; so `mass`.
        mass: See `top`.
        flags: See the package; written.
        probability: `[num_queries * num_units]`, float32; written.
        base_sizes: `[num_queries * num_units]`, int64: keys of each base sample; written where
            there are any.
    """
    num_queries, num_heads, _ = query.shape
    num_units = flags.shape[0] // num_queries
    heads = num_heads // num_units
    for unit in prange(flags.shape[0]):
        index, head = unit // num_units, unit % num_units * heads
        first = index * num_heads + head
        length, row = np.int64(lengths[index]), flags[unit]
        unselected = count_unselected(row, length)
        if unselected == 0:
            continue
        base_size = base_keys if base_keys > 0 else max(2, int(unselected * base_share))
        base_size = min(base_size, unselected)
        base_sizes[unit] = base_size
        keys, numbers = np.empty(length, np.int32), np.empty(length, np.uint64)
        stream = stream_of(seed, layer, head, length - 1)
        wanted = min(_FIRST_DRAW * base_size, unselected)
        drawn = draw(row, length, stream, unselected, wanted, keys, numbers)
        chosen = np.empty(length, np.bool_)
        smallest(numbers, drawn, base_size, chosen)
        base, found = np.empty(base_size + 1, np.int32), 0
        for i in range(drawn):  # written always, kept if chosen: see `_flag_chosen`
            base[found] = keys[i]
            found += chosen[i]
        base = base[:base_size]

        terms = np.empty((heads, base_size), np.float32)
        blocks = block_table[rows[index]]
        kv_head = head * elements.shape[1] // num_heads
        _score_keys(
            query[index],
            head,
            elements,
            kind,
            block_size,
            blocks,
            kv_head,
            base.reshape(1, -1),
            scaling,
            terms,
        )
        budget = 0
        for h in range(heads):
            own, own_top, own_mass = terms[h], top[first + h], mass[first + h]
            peak = max(own.max(), own_top.max())
            static = 0.0
            for part in range(own_top.shape[0]):
                static += own_mass[part] * math.exp(own_top[part] - peak)
            exp_in_place(own, base_size, 1.0, peak)
            budget = max(budget, budget_of(own, static, unselected, epsilon, quantile))

        if base_size + budget > drawn:
            wanted = base_size + budget
            drawn = draw(row, length, stream, unselected, wanted, keys, numbers)
        smallest(numbers, drawn, base_size + budget, chosen)
        _flag_chosen(keys, chosen, drawn, row)
        for i in range(base_size):
            row[base[i]] = 1
        probability[unit] = budget / max(1, unselected - base_size)
