"""Choosing the heaviest keys of a row that hold a share of its attention."""

from __future__ import annotations

import numpy as np
from numba import prange

from vllm_sparse_plugin.paged.kernels.compiled import compiled
from vllm_sparse_plugin.paged.kernels.exponential import exp_in_place
from vllm_sparse_plugin.paged.kernels.selection import (
    BINS,
    DIGITS,
    exclude_selected,
    mark_largest,
    order_of,
)


@compiled()
def _weigh(logits: np.ndarray, order: np.ndarray, weights: np.ndarray) -> float:
    """Weights e**(logit - largest) of the candidates, 0 for others; returns their sum."""
    peak = np.float32(-np.inf)
    for i in range(order.shape[0]):
        if order[i]:
            peak = max(peak, logits[i])
    for i in range(order.shape[0]):
        weights[i] = min(logits[i] - peak, np.float32(0.0))  # not above, where no candidate
    exp_in_place(weights, order.shape[0], 1.0, 0.0)
    # float64: at 128K keys a float32 sum would move the place where the share is reached.
    total = 0.0
    for i in range(order.shape[0]):
        weights[i] = weights[i] if order[i] else np.float32(0.0)
        total += weights[i]
    return total


@compiled()
def bound_of_mass(order: np.ndarray, weights: np.ndarray, wanted: float) -> np.uint32:
    """The largest bound such that what is not below it weighs more than is wanted; 0 for none.

    Args:
        order: uint32; 0 = no candidate.
        weights: float32, as long.
        wanted: Weight.
    """
    bound = np.uint32(0)
    masses = np.empty(BINS, np.float64)
    above = 0.0
    for level in range(len(DIGITS)):
        shift, width = DIGITS[level]
        masses[:] = 0.0
        low = np.uint32((1 << width) - 1)
        for i in range(order.shape[0]):
            if level == 0 or (order[i] ^ bound) >> np.uint32(shift) <= low:
                masses[(order[i] >> np.uint32(shift)) & low] += weights[i]
        digit = (1 << width) - 1
        while digit > 0 and above + masses[digit] <= wanted:
            above += masses[digit]
            digit -= 1
        if level == 0 and digit == 0:
            return np.uint32(0)
        bound |= np.uint32(digit) << np.uint32(shift)
    return bound


@compiled(parallel=True)
def flag_mass(
    scores: np.ndarray, top_p: float, scaling: float, lengths: np.ndarray, flags: np.ndarray
) -> None:
    """Selects the heaviest keys until they hold more than a share of what is not yet selected.

    Keys as heavy as the last one taken are taken too; the share 1 takes every key.

    Args:
        scores: `[num_queries, num_heads, capacity]`, float32; overwritten.
        top_p: The share, of the weight of the keys not selected before.
        scaling: Of the scores.
        lengths: `[num_queries]`.
        flags: See the package, of units that are query heads; written.
    """
    num_queries, num_heads, _ = scores.shape
    for item in prange(num_queries * num_heads):
        index, head = item // num_heads, item % num_heads
        length = lengths[index]
        logits = scores[index, head, :length]
        for i in range(length):
            logits[i] *= np.float32(scaling)
        order = np.empty(length, np.uint32)
        order_of(logits, order)
        exclude_selected(flags, (item, item + 1), (0, length), 1, order)
        bound = np.uint32(0)
        if top_p < 1:
            weights = np.empty(length, np.float32)
            total = _weigh(logits, order, weights)
            bound = bound_of_mass(order, weights, top_p * total)
        below = max(bound, np.uint32(1)) - np.uint32(1)
        mark_largest(order, np.uint32(below), 0, 1, flags, (item, item + 1), (0, length))
