"""The samples of the sampling maskers, marked in the flags of query heads."""

from __future__ import annotations

import math

import numpy as np
from numba import njit, prange

from vllm_sparse_plugin.paged.kernels.counter_random import stream_of
from vllm_sparse_plugin.paged.kernels.exponential import exp_in_place
from vllm_sparse_plugin.paged.kernels.prefetch import prefetch
from vllm_sparse_plugin.paged.kernels.random_order import count_unselected, draw, smallest
from vllm_sparse_plugin.paged.kernels.rows import load_row

_AHEAD = 8
"""Keys that are asked for before their turn."""
_FIRST_DRAW = 4
"""Keys drawn at first, in base samples: most often the whole sample is among them."""
_TINY = np.finfo(np.float64).tiny


@njit(parallel=True, nogil=True, cache=True)  # type: ignore[untyped-decorator]
def sample_share(
    share: float,
    seed: int,
    layer: int,
    lengths: np.ndarray,
    flags: np.ndarray,
    probability: np.ndarray,
) -> None:
    """Samples a share of each query head's unselected keys, at least one.

    Args:
        share: In (0, 1].
        seed: Of the numbers.
        layer: Index of the attention layer.
        lengths: `[num_queries]`.
        flags: See the package; units are query heads; written.
        probability: `[num_queries * num_heads]`, float32; written.
    """
    num_heads = flags.shape[0] // lengths.shape[0]
    for unit in prange(flags.shape[0]):
        length, row = np.int64(lengths[unit // num_heads]), flags[unit]
        unselected = count_unselected(row, length)
        if unselected == 0:
            continue
        wanted = min(unselected, max(1, int(unselected * share)))
        keys, numbers = np.empty(length, np.int32), np.empty(length, np.uint64)
        stream = stream_of(seed, layer, unit % num_heads, length - 1)
        drawn = draw(row, length, stream, unselected, wanted, keys, numbers)
        chosen = np.empty(drawn, np.bool_)
        smallest(numbers, drawn, wanted, chosen)
        for i in range(drawn):
            if chosen[i]:
                row[keys[i]] = 2
        probability[unit] = wanted / unselected


@njit(fastmath=True, nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _scores_of_keys(
    query: np.ndarray,
    elements: np.ndarray,
    kind: int,
    block_size: int,
    blocks: np.ndarray,
    kv_head: int,
    keys: np.ndarray,
    count: int,
    scaling: float,
    scores: np.ndarray,
) -> None:
    """Scaled scores of the first `count` listed keys for one query head, float32."""
    head_size = query.shape[0]
    buffer = np.empty(head_size, np.float32)
    for i in range(-_AHEAD, count):
        if i + _AHEAD < count:
            later = np.int64(keys[i + _AHEAD])
            start = later % block_size * head_size
            prefetch(elements, np.int64(blocks[later // block_size]), kv_head, start, head_size)
        if i < 0:
            continue
        token = np.int64(keys[i])
        start = token % block_size * head_size
        key = load_row(
            elements, np.int64(blocks[token // block_size]), kv_head, start, buffer, kind
        )
        score = np.float32(0.0)
        for d in range(head_size):
            score += query[d] * key[d]
        scores[i] = score * np.float32(scaling)


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
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
    total = 0.0
    for i in range(size):
        total += np.float64(base_mass[i])
    mean = total / max(1, size)
    squares = 0.0
    for i in range(size):
        squares += (np.float64(base_mass[i]) - mean) ** 2
    deviation = math.sqrt(squares / max(1, size - 1))
    tolerated = max(epsilon * (static + mean * unselected), _TINY)
    wanted = (quantile * deviation * rest / tolerated) ** 2
    # Without replacement: the variance falls to 0 as the sample takes everything.
    corrected = wanted / (1 + wanted / max(1, rest))
    budget: int = min(max(math.ceil(corrected), size), rest)
    return budget


@njit(parallel=True, nogil=True, cache=True)  # type: ignore[untyped-decorator]
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
) -> None:
    """Selects a base sample for each query head, and samples as many keys as it asks for.

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
        top: What is selected, see `sum_selected_mass`; so `mass`.
        mass: See `top`.
        flags: See the package; units are query heads; written.
        probability: `[num_queries * num_heads]`, float32; written.
    """
    num_heads = query.shape[1]
    group = num_heads // elements.shape[1]
    for unit in prange(flags.shape[0]):
        index, head = unit // num_heads, unit % num_heads
        length, row = np.int64(lengths[index]), flags[unit]
        unselected = count_unselected(row, length)
        if unselected == 0:
            continue
        base_size = base_keys if base_keys > 0 else max(2, int(unselected * base_share))
        base_size = min(base_size, unselected)
        keys, numbers = np.empty(length, np.int32), np.empty(length, np.uint64)
        stream = stream_of(seed, layer, head, length - 1)
        wanted = min(_FIRST_DRAW * base_size, unselected)
        drawn = draw(row, length, stream, unselected, wanted, keys, numbers)
        chosen = np.empty(length, np.bool_)
        smallest(numbers, drawn, base_size, chosen)
        base, found = np.empty(base_size, np.int32), 0
        for i in range(drawn):
            if chosen[i]:
                base[found] = keys[i]
                found += 1

        terms = np.empty(base_size, np.float32)
        blocks = block_table[rows[index]]
        q, kv_head = query[index, head], head // group
        _scores_of_keys(
            q, elements, kind, block_size, blocks, kv_head, base, base_size, scaling, terms
        )
        peak = max(terms.max(), top[unit].max())
        static = 0.0
        for part in range(top.shape[1]):
            static += mass[unit, part] * math.exp(top[unit, part] - peak)
        exp_in_place(terms, base_size, 1.0, peak)
        budget = budget_of(terms, static, unselected, epsilon, quantile)

        if base_size + budget > drawn:
            wanted = base_size + budget
            drawn = draw(row, length, stream, unselected, wanted, keys, numbers)
        smallest(numbers, drawn, base_size + budget, chosen)
        for i in range(drawn):
            if chosen[i]:
                row[keys[i]] = 2
        for i in range(base_size):
            row[base[i]] = 1
        probability[unit] = budget / max(1, unselected - base_size)
