"""Choosing the best of a row of scores, and marking what was chosen."""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from vllm_sparse_plugin.paged.kernels.exponential import exp_in_place

_DIGITS = ((21, 11), (10, 11), (0, 10))
"""Shift and width of the radix sort's digits, from the highest."""


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def order_of(scores: np.ndarray, order: np.ndarray, count: int) -> None:
    """Integers that rank as their scores do; 0 is left for "no candidate".

    Args:
        scores: float32, no NaN.
        order: uint32; written.
        count: How many.
    """
    for i in range(count):
        scores[i] += np.float32(0.0)  # -0.0 equals 0.0
    bits = scores.view(np.uint32)
    for i in range(count):
        sign = bits[i] >> np.uint32(31)
        order[i] = bits[i] ^ ((np.uint32(0) - sign) | np.uint32(0x80000000))


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def bound_of_largest(order: np.ndarray, length: int, count: int) -> tuple[np.int64, int]:
    """Where the `count` largest of a row begin.

    Args:
        order: uint32; 0 = no candidate.
        length: Of the row.
        count: At least 1.

    Returns:
        `(bound, room)`: everything above the bound is among them, and the first `room` that equal
        it. `(0, 0)`: all candidates are.
    """
    available = 0
    for i in range(length):
        available += order[i] != 0
    if available <= count:
        return np.int64(0), 0
    bound, mask = np.uint32(0), np.uint32(0)
    room = count
    for shift, width in _DIGITS:
        histogram = np.zeros(1 << width, np.int64)
        low = np.uint32((1 << width) - 1)
        for i in range(length):
            if order[i] != 0 and order[i] & mask == bound:
                histogram[(order[i] >> np.uint32(shift)) & low] += 1
        digit = (1 << width) - 1
        while histogram[digit] < room:
            room -= histogram[digit]
            digit -= 1
        bound |= np.uint32(digit) << np.uint32(shift)
        mask |= low << np.uint32(shift)
    return np.int64(bound), room


@njit(fastmath=True, nogil=True, cache=True)  # type: ignore[untyped-decorator]
def pool_scores(
    scores: np.ndarray, length: int, scaling: float, shares: np.ndarray, powers: np.ndarray
) -> None:
    """The mean, over query heads, of the share of attention that their scores give each key.

    The rule of `head_groups.pooled_scores`.

    Args:
        scores: `[heads, capacity]`, float32; overwritten.
        length: Of each row.
        scaling: Of the scores.
        shares: float32; written.
        powers: int32 scratch.
    """
    heads = scores.shape[0]
    shares[:length] = np.float32(0.0)
    for h in range(heads):
        row = scores[h]
        peak = np.float32(-np.inf)
        for i in range(length):
            row[i] *= np.float32(scaling)
            peak = max(peak, row[i])
        for i in range(length):
            row[i] -= peak
        exp_in_place(row, powers, length)
        total = np.float32(0.0)
        for i in range(length):
            total += row[i]
        factor = np.float32(1.0) / (total * np.float32(heads))
        for i in range(length):
            shares[i] += row[i] * factor


@njit(parallel=True, nogil=True, cache=True)  # type: ignore[untyped-decorator]
def flag_range(
    flags: np.ndarray, lengths: np.ndarray, begins: np.ndarray, ends: np.ndarray
) -> None:
    """Selects the keys at positions [begin, end) of each query, for all its units.

    Args:
        flags: See the package.
        lengths: `[num_queries]`.
        begins: `[num_queries]`, at least 0.
        ends: `[num_queries]`, at most the length.
    """
    num_units = flags.shape[0] // lengths.shape[0]
    for unit in prange(flags.shape[0]):
        index = unit // num_units
        if begins[index] < ends[index]:
            flags[unit, begins[index] : ends[index]] = 1


@njit(parallel=True, nogil=True, cache=True)  # type: ignore[untyped-decorator]
def flag_largest(
    scores: np.ndarray,
    page_size: int,
    selectors: int,
    counts: np.ndarray,
    scaling: float,
    lengths: np.ndarray,
    flags: np.ndarray,
) -> None:
    """Selects, per query, the pages with the highest scores that have something left to select.

    With a page size of 1, pages are keys. Equal scores: the lower page wins.

    Args:
        scores: `[num_queries, num_heads, >= pages]`, float32; overwritten.
        page_size: Keys of a page.
        selectors: How many select per query: query heads, or KV heads (pooled). Each selects for
            its share of the units; a page is out when none of them could gain from it.
        counts: `[num_queries]`, pages to select.
        scaling: Of the scores, for pooling.
        lengths: `[num_queries]`.
        flags: See the package; written.
    """
    num_queries, num_heads, _ = scores.shape
    num_units = flags.shape[0] // num_queries
    heads = num_heads // selectors
    units = num_units // selectors
    for item in prange(num_queries * selectors):
        index, selector = item // selectors, item % selectors
        length = lengths[index]
        pages = (length + page_size - 1) // page_size
        if counts[index] <= 0:
            continue
        first = index * num_units + selector * units
        row = scores[index, selector * heads]
        if heads > 1:
            row = np.empty(pages, np.float32)
            pool_scores(
                scores[index, selector * heads : (selector + 1) * heads],
                pages,
                scaling,
                row,
                np.empty(pages, np.int32),
            )
        order = np.empty(pages, np.uint32)
        order_of(row, order, pages)
        for page in range(pages):
            begin, end = page * page_size, min((page + 1) * page_size, length)
            is_open = False
            for unit in range(first, first + units):
                for token in range(begin, end):
                    if flags[unit, token] == 0:
                        is_open = True
                        break
                if is_open:
                    break
            if not is_open:
                order[page] = 0
        bound, room = bound_of_largest(order, pages, counts[index])
        for page in range(pages):
            if order[page] < bound or order[page] == 0:
                continue
            if order[page] == bound:
                if room == 0:
                    continue
                room -= 1
            begin, end = page * page_size, min((page + 1) * page_size, length)
            for unit in range(first, first + units):
                flags[unit, begin:end] = 1
