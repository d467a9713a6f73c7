"""Ranges of keys, and the best keys beside them, as lists of tokens: selected and listed at once.

For rows that are too long for one program (`page_lists` does the others), and for groups of query
heads, whose shares of attention are added up. A group's scores are read once; what they become,
numbers that rank as the shares do, twice:

- Numbers are made, part by part, and counted in bins, see `share_bins`.
- Keys above the bin that has the last place are listed. Those in it are put behind them, keys in
  the list and numbers side by side.
- One program chooses among those, and moves the chosen ones up.

(A radix selection of four digits and flags of single keys, which this takes the place of, read
numbers four times and flags twice: it was half of the attention's time on an H200, at 32K keys.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton.language as tl

from vllm_sparse_plugin.paged.triton_kernels.grids import launched, power_of_2
from vllm_sparse_plugin.paged.triton_kernels.key_ranges import (
    MOST_RANGES,
    count_covered,
    in_ranges,
)
from vllm_sparse_plugin.paged.triton_kernels.lists import DeviceLists
from vllm_sparse_plugin.paged.triton_kernels.pooling import (
    POOLING_TILE,
    PoolingWorkspace,
    load_shares,
    shifts_of,
    tiles_at_once,
)
from vllm_sparse_plugin.paged.triton_kernels.radix import (
    is_last,
    live_parts,
    load_numbers,
    order_of,
    part_of,
)
from vllm_sparse_plugin.paged.triton_kernels.row_selection import (
    CHUNK,
    WARPS,
    bound_of,
    chosen_of,
)
from vllm_sparse_plugin.paged.triton_kernels.share_bins import (
    BINS,
    WORDS,
    digit_of,
    divide,
    first_fine_of,
    rank_of,
)

_SCORES_AT_ONCE = 2048
"""Of all heads of a group together. (With groups of four, a program has 64 to 72 registers in each
thread then, depending on Triton: all parts of some 60 rows run at once on a large GPU.)"""
_PART_WARPS = 4
_PARTS = 16


@launched
def _number_kernel(
    scores,
    lengths,
    counts,
    every,
    ranges,
    peaks,
    masses,
    histograms,
    states,
    places,
    scale,
    row_stride,
    ranges_stride,
    tiles,
    LISTS: tl.constexpr,
    HEADS: tl.constexpr,
    HEADS_TILE: tl.constexpr,
    RANGES: tl.constexpr,
    HAS_EVERY: tl.constexpr,
    AT_ONCE: tl.constexpr,
    POOLING_TILE: tl.constexpr,
    PARTS: tl.constexpr,
    BINS: tl.constexpr,
    STEP: tl.constexpr,
    WORDS: tl.constexpr,
):
    """Grid: lists, parts. A part's numbers take the place of its first head's scores."""
    item, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    index = item // LISTS
    length = tl.load(lengths + index)
    begin, end = part_of(length, part, PARTS, STEP)
    if begin < end:
        is_every = tl.load(every + index) > 0 if HAS_EVERY else length < 0
        ranges += index
        scores += item * HEADS * row_stride
        live_tiles = tl.cdiv(length, POOLING_TILE)
        own_peaks, own_masses = peaks + item * HEADS * tiles, masses + item * HEADS * tiles
        shifts = shifts_of(own_peaks, own_masses, tiles, live_tiles, HEADS, HEADS_TILE, AT_ONCE)
        first_fine = first_fine_of(length)
        histogram = tl.zeros([BINS], tl.int32)
        for first in range(begin, end, STEP):
            share = load_shares(
                scores, row_stride, shifts, scale, first, end, HEADS, HEADS_TILE, STEP
            )
            keys = first // 16 * 16 + tl.arange(0, STEP)  # so that Triton knows of the 16
            mask = keys < end
            is_listed = in_ranges(keys, is_every, ranges, ranges_stride, RANGES)
            number = tl.where(is_listed, 0, order_of(share))
            numbers = (scores + keys).to(tl.pointer_type(tl.int32))
            tl.debug_barrier()  # of short rows, several threads load the same scores
            # A mask that differs between neighbours would make each a store of its own.
            if first + STEP <= end:
                tl.store(numbers, number.to(tl.int32, bitcast=True))
            else:
                tl.store(numbers, number.to(tl.int32, bitcast=True), mask=mask)
            histogram += tl.histogram(digit_of(number, first_fine), BINS, mask=mask)
        bins = tl.arange(0, BINS)
        tl.store(histograms + (item * PARTS + part) * BINS + bins, histogram)
        live = live_parts(length, PARTS, STEP)
        state = states + item * WORDS
        if is_last(state, live):
            wanted = tl.load(counts + index).to(tl.int32)
            of_row = histograms + item * PARTS * BINS
            divide(of_row, state, places + item * 2 * PARTS, live, wanted, first_fine, PARTS, BINS)


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
):
    """Grid: lists, parts. Lists what is listed for sure, and behind it what is chosen from."""
    item, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    index = item // LISTS
    length = tl.load(lengths + index)
    begin, end = part_of(length, part, PARTS, STEP)
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
            number, mask = load_numbers(numbers, first, end, STEP)
            keys = first + tl.arange(0, STEP)
            rank = rank_of(number)
            is_listed = mask & (rank >= least_listed)
            is_open = mask & (rank >= least_open) & (rank < least_listed)
            # Two counts of 16 bits: one sum over all threads takes no longer for that.
            one = is_listed.to(tl.int32) + (is_open.to(tl.int32) << 16)
            sums = tl.cumsum(one, 0) - one
            of_listed, of_open = sums & 0xFFFF, sums >> 16
            tl.store(listed + of_listed, keys, mask=is_listed)
            tl.store(behind + of_open, keys, mask=is_open)
            tl.store(chosen_from + of_open, number.to(tl.int32, bitcast=True), mask=is_open)
            total = tl.sum(one, 0)
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
):
    """Grid: lists. Moves up what is chosen, of what stands behind a list."""
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
            bound, left = bound_of(numbers, rest, room, CHUNK, True)
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


@dataclass(frozen=True)
class KeyListsWorkspace:
    """What programs of a row tell each other.

    Attributes:
        histograms: `[max_rows, parts, BINS]`, int32, of the first digits of each part.
        states: `[max_rows, WORDS]`, int32; the count of programs is 0 between launches.
        places: `[max_rows, parts, 2]`, int32: see `share_bins.divide`.
    """

    histograms: torch.Tensor
    states: torch.Tensor
    places: torch.Tensor

    @classmethod
    def of(cls, max_rows: int, device: torch.device | str) -> KeyListsWorkspace:
        """Asks for the memory: 16 KiB for each row.

        Args:
            max_rows: Of a launch: queries * KV heads.
            device: Of the kernels.
        """

        def zeros(*size: int) -> torch.Tensor:
            return torch.zeros((max_rows, *size), dtype=torch.int32, device=device)

        return cls(zeros(_PARTS, BINS), zeros(WORDS), zeros(_PARTS, 2))


def list_keys(
    scores: torch.Tensor,
    kv_heads: int,
    counts: torch.Tensor,
    scaling: float,
    lengths: torch.Tensor,
    ranges: torch.Tensor,
    every: torch.Tensor | None,
    lists: DeviceLists,
    reads: torch.Tensor,
    workspace: KeyListsWorkspace,
    pooling: PoolingWorkspace,
) -> None:
    """The positions in some ranges and of the best other keys, for each KV head.

    In any order: first what is in the ranges or surely among the best, ascending, and then the
    rest of the best, ascending.

    Args:
        scores: `[num_queries, num_heads, capacity]`, float32, no NaN and no +inf, contiguous, of
            several heads per KV head; overwritten. They are pooled over each group, see `pooling`;
            of equal ones, the lower key is better.
        kv_heads: Of the layer.
        counts: `[num_queries]`, an integer type: keys to select besides those in the ranges.
        scaling: Of the scores.
        lengths: `[num_queries]`, int32.
        ranges: See `page_lists.list_pages`; so `every`, `lists` and `reads`.
        every: As there.
        lists: As there.
        reads: As there.
        workspace: For as many rows.
        pooling: What `pooling.weigh_scores` has found of the scores.

    Raises:
        ValueError: There are too many ranges, groups have one head, or memory does not fit the
            scores.
    """
    num_queries, num_heads, capacity = scores.shape
    num_lists, num_ranges, heads = num_queries * kv_heads, len(ranges) // 2, num_heads // kv_heads
    if num_ranges > MOST_RANGES:
        raise ValueError(f"{num_ranges} ranges, but no more than {MOST_RANGES} are listed here")
    if heads < 2:
        raise ValueError(f"{num_heads} query heads of {kv_heads} KV heads are no groups")
    if (
        len(lists.tokens) < num_lists
        or lists.tokens.shape[1] < capacity
        or lists.log_weights.shape[1:] != (0, 1)
        or len(workspace.states) < num_lists
    ):
        raise ValueError(
            f"lists of {tuple(lists.tokens.shape)} tokens with weights of "
            f"{tuple(lists.log_weights.shape[1:])}, and a workspace for {len(workspace.states)} "
            f"rows, cannot hold {num_lists} of {capacity} keys"
        )
    pooling.check(scores)
    grid, tiles = (num_lists, _PARTS), pooling.peaks.shape[1]
    step = max(16 * _PART_WARPS, _SCORES_AT_ONCE // power_of_2(heads))
    own_every, own_ranges = lengths if every is None else every, ranges if num_ranges else lengths
    sizes = {
        "LISTS": kv_heads,
        "HEADS": heads,
        "RANGES": num_ranges,
        "HAS_EVERY": every is not None,
        "WORDS": WORDS,
    }
    _number_kernel[grid](
        scores,
        lengths,
        counts,
        own_every,
        own_ranges,
        pooling.peaks,
        pooling.masses,
        workspace.histograms,
        workspace.states,
        workspace.places,
        scaling * math.log2(math.e),
        capacity,
        ranges.stride(0),
        tiles,
        **sizes,
        HEADS_TILE=power_of_2(heads),
        AT_ONCE=tiles_at_once(tiles, heads),
        POOLING_TILE=POOLING_TILE,
        PARTS=_PARTS,
        BINS=BINS,
        STEP=step,
        num_warps=_PART_WARPS,
    )
    _list_kernel[grid](
        scores,
        lengths,
        own_every,
        own_ranges,
        workspace.states,
        workspace.places,
        lists.tokens,
        capacity,
        lists.tokens.shape[1],
        ranges.stride(0),
        **sizes,
        PARTS=_PARTS,
        STEP=step,
        num_warps=_PART_WARPS,
    )
    _choose_kernel[(num_lists,)](
        scores,
        lengths,
        own_every,
        own_ranges,
        workspace.states,
        lists.tokens,
        lists.counts,
        reads,
        capacity,
        lists.tokens.shape[1],
        ranges.stride(0),
        reads.stride(0),
        **sizes,
        CHUNK=CHUNK,
        num_warps=WARPS,
    )
