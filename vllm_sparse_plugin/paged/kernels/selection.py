"""Choosing the best of a row of scores, and marking what was chosen."""

from __future__ import annotations

import numpy as np
from numba import prange

from vllm_sparse_plugin.paged.kernels.compiled import compiled
from vllm_sparse_plugin.paged.kernels.pooling import pool_scores

DIGITS = ((21, 11), (10, 11), (0, 10))
"""Shift and width of the radix selection's digits, from the highest."""
BINS = 1 << 11
"""Of a histogram of the widest digit."""

_TASKS = 64
"""Rows that are worked on together, at most, or parts of rows where rows are few."""
_ORDERS_AT_ONCE = 1 << 18
"""Pages of the rows that are worked on together: about what a core's cache holds."""
_PAGES_PER_PART = 16384
"""A row is cut into parts of at least this many pages."""


@compiled()
def order_of(scores: np.ndarray, order: np.ndarray) -> None:
    """Integers that rank as their scores do; 0 is left for "no candidate".

    Args:
        scores: float32, no NaN.
        order: uint32, as long; written.
    """
    bits = scores.view(np.uint32)
    for i in range(scores.shape[0]):
        word = bits[i]
        word = np.uint32(0) if word == np.uint32(0x80000000) else word  # -0.0 equals 0.0
        sign = word >> np.uint32(31)
        order[i] = word ^ ((np.uint32(0) - sign) | np.uint32(0x80000000))


@compiled()
def exclude_selected(
    flags: np.ndarray,
    units: tuple[int, int],
    keys: tuple[int, int],
    page_size: int,
    order: np.ndarray,
) -> None:
    """Sets the order of pages to 0 whose keys all units have.

    Args:
        flags: See the package.
        units: The first of them, and the one after the last.
        keys: Of those pages; likewise.
        page_size: Keys of a page; the last one may be shorter.
        order: `[pages]`, uint32.
    """
    first, end = keys
    lowest = flags[units[0], first:end].copy()
    for unit in range(units[0] + 1, units[1]):
        row = flags[unit, first:end]
        for i in range(row.shape[0]):
            lowest[i] = min(lowest[i], row[i])
    if page_size == 1:
        for i in range(order.shape[0]):
            order[i] = order[i] if lowest[i] == 0 else np.uint32(0)
        return
    for page in range(order.shape[0]):
        least = np.uint8(255)
        for i in range(page * page_size, min((page + 1) * page_size, lowest.shape[0])):
            least = min(least, lowest[i])
        if least:
            order[page] = 0


@compiled()
def count_digits(
    order: np.ndarray, shift: int, width: int, bound: np.uint32, histogram: np.ndarray
) -> None:
    """How often each digit occurs among the numbers whose higher digits are those of a bound.

    Args:
        order: uint32.
        shift: Bits below the digit.
        width: Bits of the digit.
        bound: Zero in this digit and below.
        histogram: `[>= 2 ** width]`, int32; written.
    """
    histogram[:] = 0
    low = np.uint32((1 << width) - 1)
    down = np.uint32(shift)
    if shift + width == 32:
        for i in range(order.shape[0]):
            histogram[order[i] >> down] += 1
        return
    up = np.uint32(shift + width)
    above = bound >> up
    for i in range(order.shape[0]):
        if order[i] >> up == above:
            histogram[(order[i] >> down) & low] += 1


@compiled()
def digit_of(histograms: np.ndarray, place: int) -> tuple[int, int]:
    """Which digit the number at a place has, counted from the largest.

    Args:
        histograms: `[parts, bins]`, whose sum is meant.
        place: At least 1.

    Returns:
        The digit, and the place among the numbers with this digit. Digit 0 also if there are fewer
        numbers than that.
    """
    for digit in range(histograms.shape[1] - 1, 0, -1):
        found = 0
        for part in range(histograms.shape[0]):
            found += histograms[part, digit]
        if found >= place:
            return digit, place
        place -= found
    return 0, place


@compiled()
def mark_largest(
    order: np.ndarray,
    bound: np.uint32,
    room: int,
    page_size: int,
    flags: np.ndarray,
    units: tuple[int, int],
    keys: tuple[int, int],
) -> None:
    """Selects the pages above a bound, and the first ones that equal it.

    Args:
        order: `[pages]`, uint32.
        bound: Of the order.
        room: How many that equal the bound are selected.
        page_size: Keys of a page; the last one may be shorter.
        flags: See the package; written.
        units: The first of them, and the one after the last.
        keys: Of those pages; likewise.
    """
    first, end = keys
    for unit in range(units[0], units[1]):
        row = flags[unit, first:end]
        if page_size == 1:
            for i in range(order.shape[0]):
                row[i] = np.uint8(1) if order[i] > bound else row[i]
        else:
            for page in range(order.shape[0]):
                if order[page] > bound:
                    row[page * page_size : (page + 1) * page_size] = 1
        page, left = 0, room
        while left > 0:
            if order[page] == bound:
                row[page * page_size : (page + 1) * page_size] = 1
                left -= 1
            page += 1


@compiled(parallel=True)
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


@compiled()
def _flag_largest_alone(
    scores: np.ndarray,
    page_size: int,
    count: int,
    length: int,
    flags: np.ndarray,
    units: tuple[int, int],
    order: np.ndarray,
    histograms: np.ndarray,
) -> None:
    """`flag_largest` for one row of scores.

    Args:
        scores: `[>= pages]`, float32.
        page_size: Keys of a page.
        count: Pages to select.
        length: Keys of the query.
        flags: See the package; written.
        units: Those that select together: the first of them, and the one after the last.
        order: `[>= pages]`, uint32; overwritten.
        histograms: `[1, BINS]`, int32; overwritten.
    """
    if count <= 0:
        return
    pages = (length + page_size - 1) // page_size
    own, keys = order[:pages], (0, length)
    order_of(scores[:pages], own)
    exclude_selected(flags, units, keys, page_size, own)
    bound, room = np.uint32(0), count
    for level in range(len(DIGITS)):
        shift, width = DIGITS[level]
        count_digits(own, shift, width, bound, histograms[0])
        digit, room = digit_of(histograms, room)
        bound |= np.uint32(digit) << np.uint32(shift)
        if level == 0 and digit == 0:  # fewer candidates than are wanted: all of them
            room = 0
            break
    if room:
        room = min(room, histograms[0, bound & np.uint32((1 << DIGITS[-1][1]) - 1)])
    mark_largest(own, bound, room, page_size, flags, units, keys)


@compiled(parallel=True)
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

    With a page size of 1, pages are keys. Equal scores: the lower page wins. A radix selection:
    the bound is found digit by digit, from histograms.

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
    heads = num_heads // selectors
    if heads > 1:
        pool_scores(scores, selectors, page_size, scaling, lengths)
    units = flags.shape[0] // num_queries // selectors
    all_items = num_queries * selectors
    longest = (int(lengths.max()) + page_size - 1) // page_size
    held = max(1, min(all_items, _TASKS, _ORDERS_AT_ONCE // longest))
    parts = max(1, min(_TASKS // held, longest // _PAGES_PER_PART))
    order = np.empty((held, longest), np.uint32)
    histograms = np.empty((held, parts, BINS), np.int32)
    bounds = np.empty(held, np.uint32)
    rooms = np.empty(held, np.int64)  # places left among the pages that equal the bound so far
    for start in range(0, all_items, held):
        items = min(held, all_items - start)
        if parts == 1:  # each row by itself: the threads meet once
            for item in prange(items):
                index, selector = (start + item) // selectors, (start + item) % selectors
                _flag_largest_alone(
                    scores[index, selector * heads],
                    page_size,
                    counts[index],
                    lengths[index],
                    flags,
                    ((start + item) * units, (start + item + 1) * units),
                    order[item],
                    histograms[item],
                )
            continue
        for item in range(items):
            rooms[item] = max(0, counts[(start + item) // selectors])
            bounds[item] = 0 if rooms[item] else 0xFFFFFFFF
        for level in range(len(DIGITS)):
            shift, width = DIGITS[level]
            for task in prange(items * parts):
                item, part = task // parts, task % parts
                if rooms[item] == 0:
                    continue
                index, selector = (start + item) // selectors, (start + item) % selectors
                begin, end = _part_of(lengths[index], page_size, part, parts)
                own = order[item, begin:end]
                if level == 0:
                    order_of(scores[index, selector * heads, begin:end], own)
                    exclude_selected(
                        flags,
                        ((start + item) * units, (start + item + 1) * units),
                        (begin * page_size, min(end * page_size, lengths[index])),
                        page_size,
                        own,
                    )
                count_digits(own, shift, width, bounds[item], histograms[item, part])
            for item in prange(items):
                if rooms[item]:
                    digit, rooms[item] = digit_of(histograms[item], rooms[item])
                    bounds[item] |= np.uint32(digit) << np.uint32(shift)
                    if level == 0 and digit == 0:  # fewer candidates than are wanted: all of them
                        rooms[item] = 0
        for task in prange(items * parts):
            item, part = task // parts, task % parts
            index = (start + item) // selectors
            begin, end = _part_of(lengths[index], page_size, part, parts)
            room = rooms[item]
            if room:
                digit = bounds[item] & np.uint32((1 << DIGITS[-1][1]) - 1)
                for before in range(part):
                    room -= histograms[item, before, digit]
                room = min(room, histograms[item, part, digit])
            mark_largest(
                order[item, begin:end],
                bounds[item],
                room,
                page_size,
                flags,
                ((start + item) * units, (start + item + 1) * units),
                (begin * page_size, min(end * page_size, lengths[index])),
            )


@compiled()
def _part_of(length: int, page_size: int, part: int, parts: int) -> tuple[int, int]:
    pages = (length + page_size - 1) // page_size
    share = (pages + parts - 1) // parts
    return min(part * share, pages), min((part + 1) * share, pages)
