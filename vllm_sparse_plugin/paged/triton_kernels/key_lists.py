"""Ranges of keys, and the best keys beside them, as lists of tokens: selected and listed at once.

For rows that are too long for one program (`page_lists` does the others), and for groups of query
heads, whose shares of attention are added up. What their scores become, numbers that rank as the
shares do, is read twice:

- Numbers are made, part by part, and counted in bins, see `key_numbers` and `share_bins`.
- Keys above the bin that has the last place are listed. Those in it are put behind them, keys in
  the list and numbers side by side.
- One program chooses among those, and moves the chosen ones up.

(A radix selection of four digits and flags of single keys, which this takes the place of, read
numbers four times and flags twice: it was half of the attention's time on an H200, at 32K keys.)
"""

from __future__ import annotations

import torch
import triton.language as tl

from vllm_sparse_plugin.paged.triton_kernels.grids import await_launches, launched, overlapped
from vllm_sparse_plugin.paged.triton_kernels.key_numbers import PART_WARPS, PARTS, KeyRows
from vllm_sparse_plugin.paged.triton_kernels.key_ranges import count_covered
from vllm_sparse_plugin.paged.triton_kernels.lists import DeviceLists
from vllm_sparse_plugin.paged.triton_kernels.radix import load_numbers, part_of
from vllm_sparse_plugin.paged.triton_kernels.row_selection import (
    CHUNK,
    WARPS,
    bound_of,
    chosen_of,
    extremes_of_row,
)
from vllm_sparse_plugin.paged.triton_kernels.share_bins import rank_of


@launched
def _list_kernel(
    scores,
    lengths,
    every,
    ranges,
    states,
    places,
    tokens,
    row_stride,
    list_stride,
    ranges_stride,
    LISTS: tl.constexpr,
    HEADS: tl.constexpr,
    RANGES: tl.constexpr,
    HAS_EVERY: tl.constexpr,
    PARTS: tl.constexpr,
    STEP: tl.constexpr,
    WORDS: tl.constexpr,
    IS_OVERLAPPED: tl.constexpr,
):
    """Grid: lists, parts. Lists what is listed for sure, and behind it what is chosen from."""
    await_launches(IS_OVERLAPPED)
    item, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    index = item // LISTS
    length = tl.load(lengths + index)
    begin, end = part_of(length, part, tl.num_programs(1), STEP)
    if begin < end:
        is_every = tl.load(every + index) > 0 if HAS_EVERY else length < 0
        ranges += index
        state, before = states + item * WORDS, places + (item * PARTS + part) * 2
        least_listed = tl.load(state).to(tl.uint32, bitcast=True)
        least_open = tl.load(state + 1).to(tl.uint32, bitcast=True)
        numbers = (scores + item * HEADS * row_stride).to(tl.pointer_type(tl.int32))
        chosen_from = numbers + row_stride + tl.load(before + 1)
        # Keys in the ranges are listed among those of their part.
        covered_before = count_covered(begin * 0, begin, ranges, ranges_stride, RANGES)
        covered = count_covered(begin * 0, length, ranges, ranges_stride, RANGES)
        tokens += item * list_stride
        listed = tokens + tl.load(before) + tl.where(is_every, begin, covered_before)
        behind = (
            tokens + tl.load(state + 2) + tl.where(is_every, length, covered) + tl.load(before + 1)
        )
        for first in range(begin, end, STEP):
            # Four neighbours in a thread: to sum over threads takes a quarter as long.
            quads = first + 4 * tl.arange(0, STEP // 4)
            ones = tl.zeros([STEP // 4], tl.int32)
            known = ()
            for own in tl.static_range(4):
                mask = quads + own < end
                number = tl.load(numbers + quads + own, mask=mask, other=0)
                rank = rank_of(number.to(tl.uint32, bitcast=True))
                is_listed = mask & (rank >= least_listed)
                is_open = mask & (rank >= least_open) & (rank < least_listed)
                # Two counts of 16 bits: one sum over all threads takes no longer for that.
                one = is_listed.to(tl.int32) + (is_open.to(tl.int32) << 16)
                known = known + (number, one, ones)  # type: ignore[assignment]  # noqa: RUF005
                ones += one
            sums = tl.cumsum(ones, 0) - ones
            for own in tl.static_range(4):
                one, place = known[3 * own + 1], sums + known[3 * own + 2]
                of_listed, of_open = place & 0xFFFF, place >> 16
                tl.store(listed + of_listed, quads + own, mask=one % 2 > 0)
                tl.store(behind + of_open, quads + own, mask=one > 1)
                tl.store(chosen_from + of_open, known[3 * own], mask=one > 1)
            total = tl.sum(ones, 0)
            listed += total & 0xFFFF
            behind += total >> 16
            chosen_from += total >> 16


@launched
def _choose_kernel(
    scores,
    lengths,
    every,
    ranges,
    states,
    tokens,
    listed,
    reads,
    row_stride,
    list_stride,
    ranges_stride,
    reads_stride,
    LISTS: tl.constexpr,
    HEADS: tl.constexpr,
    RANGES: tl.constexpr,
    HAS_EVERY: tl.constexpr,
    CHUNK: tl.constexpr,
    WORDS: tl.constexpr,
    IS_OVERLAPPED: tl.constexpr,
):
    """Grid: lists. Moves up what is chosen, of what stands behind a list."""
    await_launches(IS_OVERLAPPED)
    item = tl.program_id(0).to(tl.int64)
    index = item // LISTS
    length = tl.load(lengths + index)
    total = tl.zeros_like(length)
    if length > 0:
        is_every = tl.load(every + index) > 0 if HAS_EVERY else length < 0
        state = states + item * WORDS
        room, rest = tl.load(state + 3), tl.load(state + 4)
        covered = count_covered(total, length, ranges + index, ranges_stride, RANGES)
        total = tl.load(state + 2) + tl.where(is_every, length, covered)
        if room > 0:
            numbers = (scores + item * HEADS * row_stride).to(tl.pointer_type(tl.int32))
            numbers += row_stride
            behind = tokens + item * list_stride + total
            lowest, highest, counts = extremes_of_row(numbers, rest, CHUNK)
            bound, left = bound_of(numbers, rest, room, lowest, highest, counts, CHUNK, True)
            moved = tl.zeros_like(total)
            for chunk in range(0, rest, CHUNK):
                number, mask = load_numbers(numbers, chunk, rest, CHUNK)
                inside = chunk + tl.arange(0, CHUNK)
                key = tl.load(behind + inside, mask=mask, other=0)
                chosen, left = chosen_of(number, bound, left)
                is_chosen = chosen.to(tl.int32)
                place = moved + tl.cumsum(is_chosen, 0) - 1
                moved += tl.sum(is_chosen, 0)
                tl.debug_barrier()  # all threads have read the keys
                tl.store(behind + place, key, mask=chosen)
        total += room
        more = total.to(tl.int64)
        tl.atomic_add(reads + index * reads_stride, more * HEADS, sem="relaxed")
        tl.atomic_add(reads + index * reads_stride + 1, more, sem="relaxed")
    tl.store(listed + item, total)


def list_numbered(
    scores: torch.Tensor, rows: KeyRows, lists: DeviceLists, reads: torch.Tensor
) -> None:
    """The positions in some ranges and of the best other keys, for each KV head.

    In any order: first what is in the ranges or surely among the best, ascending, and then the
    rest of the best, ascending. Of equal keys, the lower one is better.

    Args:
        scores: What `number_scores` has written; the rows of each group's second head, too, are
            overwritten.
        rows: To be listed, as they were numbered.
        lists: See `page_lists.list_pages`; so `reads`.
        reads: As there.

    Raises:
        ValueError: The lists cannot hold the rows.
    """
    num_lists, capacity = len(rows), scores.shape[2]
    if (
        len(lists.tokens) < num_lists
        or lists.tokens.shape[1] < capacity
        or lists.log_weights.shape[1:] != (0, 1)
    ):
        raise ValueError(
            f"lists of {tuple(lists.tokens.shape)} tokens with weights of "
            f"{tuple(lists.log_weights.shape[1:])} cannot hold {num_lists} of {capacity} keys"
        )
    sizes = rows.constants()
    workspace, (lengths, every, ranges, ranges_stride) = rows.workspace, rows.keys
    _list_kernel[rows.grid](
        scores,
        lengths,
        every,
        ranges,
        workspace.states,
        workspace.places,
        lists.tokens,
        capacity,
        lists.tokens.shape[1],
        ranges_stride,
        **sizes,
        PARTS=PARTS,
        STEP=rows.step,
        num_warps=PART_WARPS,
        **overlapped(scores.device),
    )
    _choose_kernel[(num_lists,)](
        scores,
        lengths,
        every,
        ranges,
        workspace.states,
        lists.tokens,
        lists.counts,
        reads,
        capacity,
        lists.tokens.shape[1],
        ranges_stride,
        reads.stride(0),
        **sizes,
        CHUNK=CHUNK,
        num_warps=WARPS,
        **overlapped(scores.device),
    )
