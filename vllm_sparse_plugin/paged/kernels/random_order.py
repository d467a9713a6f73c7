"""Samples without replacement: of a query's unselected keys, those with the smallest numbers.

Nothing is sorted: numbers are uniform, so that the n smallest of R lie below a bound near n / R,
and few others do.
"""

from __future__ import annotations

import math

import numpy as np

from vllm_sparse_plugin.paged.kernels.compiled import compiled
from vllm_sparse_plugin.paged.kernels.counter_random import NUMBERS, number_of

_CHUNK = 512
"""Keys whose numbers are compared at once."""
_BUCKETS = 256


@compiled()
def count_unselected(flags: np.ndarray, length: int) -> int:
    """Keys before `length` whose flag is 0."""
    count = 0
    for i in range(length):
        count += flags[i] == 0
    return count


@compiled()
def _keys_below(
    flags: np.ndarray, length: int, stream: np.uint64, bound: np.uint64, keys: np.ndarray
) -> int:
    """Writes the unselected keys with numbers below a bound, ascending; returns how many."""
    numbers, is_below = np.empty(_CHUNK, np.uint64), np.empty(_CHUNK, np.uint8)
    count = np.uint64(0)  # unsigned: a signed index is checked for counting from the end
    for first in range(0, length, _CHUNK):
        row = flags[first : min(first + _CHUNK, length)]
        start = np.uint64(first)
        for i in range(row.shape[0]):
            numbers[i] = number_of(stream, start + np.uint64(i))
        for i in range(row.shape[0]):
            is_below[i] = (numbers[i] < bound) & (row[i] == 0)
        for i in range(row.shape[0]):
            # Written in any case, kept if it is: a branch would be guessed wrong too often.
            keys[count] = first + i
            count += np.uint64(is_below[i])
    return int(count)


@compiled()
def draw(
    flags: np.ndarray,
    length: int,
    stream: np.uint64,
    unselected: int,
    wanted: int,
    keys: np.ndarray,
    numbers: np.ndarray,
) -> int:
    """Collects the unselected keys with the `wanted` smallest numbers, and a few more.

    Args:
        flags: Of one unit, see the package.
        length: Keys that the query sees.
        stream: Of the query's numbers, see `counter_random`.
        unselected: Keys with flag 0.
        wanted: At most `unselected`.
        keys: `[>= length]`, int32: their positions, ascending; written.
        numbers: uint64, likewise: their numbers; written.

    Returns:
        How many, at least `wanted`.
    """
    # Four standard deviations above the mean: a second try is rare.
    share = (wanted + 4 * math.sqrt(wanted) + 8) / max(1, unselected)
    while True:
        bound = np.uint64(min(share, 1.0) * np.float64(NUMBERS))
        count: int = _keys_below(flags, length, stream, bound, keys)
        if count >= wanted:
            break
        share *= 2
    for i in range(count):
        numbers[i] = number_of(stream, np.uint64(keys[i]))
    return count


@compiled()
def smallest(numbers: np.ndarray, count: int, wanted: int, chosen: np.ndarray) -> None:
    """Marks the `wanted` smallest; of equal ones, the first.

    Args:
        numbers: uint64, below 2**53.
        count: How many.
        wanted: At most `count`.
        chosen: `[>= count]`, boolean; written.
    """
    if wanted == 0:
        chosen[:count] = False
        return
    highest = np.uint64(0)
    for i in range(count):
        highest = max(highest, numbers[i])
    scale = _BUCKETS / (np.float64(highest) + 1.0)
    sizes = np.zeros(_BUCKETS + 1, np.int64)  # rounding may give the last number one more
    for i in range(count):
        sizes[np.int64(np.float64(numbers[i]) * scale)] += 1
    bucket, room = 0, wanted
    while sizes[bucket] < room:
        room -= sizes[bucket]
        bucket += 1
    members = np.empty(sizes[bucket], np.uint64)
    found = 0
    for i in range(count):
        if np.int64(np.float64(numbers[i]) * scale) == bucket:
            members[found] = numbers[i]
            found += 1
    members.sort()
    last = members[room - 1]
    ties = room
    for i in range(room):
        ties -= members[i] < last
    for i in range(count):
        is_tie = numbers[i] == last
        chosen[i] = numbers[i] < last or (is_tie and ties > 0)
        ties -= is_tie
