"""Numbers that rank as shares of attention do, of single keys, and how many there are of each size.

The first of three launches that list the best keys of long rows, see `key_lists`. Programs work on
parts of a row: each counts its numbers in the bins of `share_bins`, and the last one finds the bin
that has the last place.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from vllm_sparse_plugin.paged.triton_kernels.grids import (
    await_launches,
    launched,
    overlapped,
    power_of_2,
)
from vllm_sparse_plugin.paged.triton_kernels.key_ranges import MOST_RANGES, count_covered, in_ranges
from vllm_sparse_plugin.paged.triton_kernels.pooling import (
    POOLING_TILE,
    PoolingWorkspace,
    load_shares,
    shifts_of,
    tiles_at_once,
)
from vllm_sparse_plugin.paged.triton_kernels.radix import is_last, live_parts, part_of
from vllm_sparse_plugin.paged.triton_kernels.share_bins import (
    BINS,
    WORDS,
    digit_of,
    divide,
    number_of,
    usual_number,
)

_SCORES_AT_ONCE = 2048
"""Of all heads of a group together."""
PART_WARPS, _REGISTERS = 4, 64
"""Of a program, and of its threads, at most: all programs run at once on a large GPU then."""
PARTS = 32
"""Of a row, at most."""
_LEAST_PARTS, _PROGRAMS = 4, 1024
"""Parts that many rows have, and programs that keep a large GPU busy: of few rows, more parts."""


@triton.jit
def number_keys(
    share,
    first,
    end,
    is_touched,
    is_every,
    ranges,
    ranges_stride,
    numbers,
    usual,
    RANGES: tl.constexpr,
    STEP: tl.constexpr,
    BINS: tl.constexpr,
):
    """Stores the numbers of some keys; 0 is for keys that are listed whatever their share.

    Args:
        share: `[STEP]`, float32.
        first: Of the keys, a multiple of 16.
        end: Behind the last key of the part.
        is_touched: Whether any key of the part is in a range.
        is_every: See `in_ranges`; so the next two.
        ranges: As there.
        ranges_stride: As there.
        numbers: Pointer to the row's, int32.
        usual: See `usual_number`.
        RANGES: See `in_ranges`.
        STEP: Keys.
        BINS: See `share_bins`.

    Returns:
        `[BINS]`, int32: how many there are in each bin, without those that are 0.
    """
    keys = first // 16 * 16 + tl.arange(0, STEP)  # so that Triton knows of the 16
    number = number_of(share)
    # Most steps need no mask, which would make each a store of its own, and counting longer.
    if is_touched | (first + STEP > end):
        mask = keys < end
        number = tl.where(in_ranges(keys, is_every, ranges, ranges_stride, RANGES), 0, number)
        tl.store(numbers + keys, number.to(tl.int32, bitcast=True), mask=mask)
        found = tl.histogram(digit_of(number, usual), BINS, mask=mask & (number > 0))
    else:
        tl.store(numbers + keys, number.to(tl.int32, bitcast=True))
        found = tl.histogram(digit_of(number, usual), BINS)
    return found


@triton.jit
def end_part(
    histogram,
    item,
    part,
    length,
    wanted,
    usual,
    histograms,
    states,
    places,
    PARTS: tl.constexpr,
    STEP: tl.constexpr,
    BINS: tl.constexpr,
    WORDS: tl.constexpr,
):
    """Stores what a part has counted; the last program of a row divides it, see `divide`.

    Args:
        histogram: `[BINS]`, int32.
        item: Row of the launch.
        part: Of the row.
        length: Keys of the row.
        wanted: Pointer to how many are to be chosen.
        usual: See `usual_number`.
        histograms: See `KeyListsWorkspace`; so the next two.
        states: As there.
        places: As there.
        PARTS: Of a row, at most; as many as there are programs for it.
        STEP: Keys that programs work on at once.
        BINS: See `share_bins`.
        WORDS: As there.
    """
    of_row, bins = histograms + item * PARTS * BINS, tl.arange(0, BINS)
    tl.store(of_row + part * BINS + bins, histogram)
    live = live_parts(length, tl.num_programs(1), STEP)
    state = states + item * WORDS
    if is_last(state, live):
        count = tl.load(wanted).to(tl.int32)
        divide(of_row, state, places + item * 2 * PARTS, live, count, usual, PARTS, BINS)


@launched
def _number_scores(
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
    exponent,
    row_stride,
    ranges_stride,
    tiles,
    LISTS: tl.constexpr,
    HEADS: tl.constexpr,
    RANGES: tl.constexpr,
    HAS_EVERY: tl.constexpr,
    HEADS_TILE: tl.constexpr,
    AT_ONCE: tl.constexpr,
    POOLING_TILE: tl.constexpr,
    PARTS: tl.constexpr,
    BINS: tl.constexpr,
    STEP: tl.constexpr,
    WORDS: tl.constexpr,
    IS_OVERLAPPED: tl.constexpr,
):
    """Grid: lists, parts. A part's numbers take the place of its first head's scores."""
    await_launches(IS_OVERLAPPED)
    item, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    index = item // LISTS
    length = tl.load(lengths + index)
    begin, end = part_of(length, part, tl.num_programs(1), STEP)
    if begin < end:
        is_every = tl.load(every + index) > 0 if HAS_EVERY else length < 0
        ranges += index
        is_touched = is_every | (count_covered(begin, end, ranges, ranges_stride, RANGES) > 0)
        scores += item * HEADS * row_stride
        live_tiles = tl.cdiv(length, POOLING_TILE)
        own_peaks, own_masses = peaks + item * HEADS * tiles, masses + item * HEADS * tiles
        shifts, usual_share = shifts_of(
            own_peaks, own_masses, tiles, live_tiles, HEADS, HEADS_TILE, AT_ONCE, POOLING_TILE
        )
        numbers = scores.to(tl.pointer_type(tl.int32))
        usual = usual_number(usual_share)
        histogram = tl.zeros([BINS], tl.int32)
        for first in range(begin, end, STEP):
            share = load_shares(
                scores, row_stride, shifts, exponent, first, end, HEADS, HEADS_TILE, STEP
            )
            tl.debug_barrier()  # of short rows, several threads load the same scores
            histogram += number_keys(
                share,
                first,
                end,
                is_touched,
                is_every,
                ranges,
                ranges_stride,
                numbers,
                usual,
                RANGES,
                STEP,
                BINS,
            )
        end_part(
            histogram,
            item,
            part,
            length,
            counts + index,
            usual,
            histograms,
            states,
            places,
            PARTS,
            STEP,
            BINS,
            WORDS,
        )


@dataclass(frozen=True)
class KeyListsWorkspace:
    """What programs of a row tell each other.

    Attributes:
        histograms: `[max_rows, parts, BINS]`, int32: how many numbers of a part are in each bin.
        states: `[max_rows, WORDS]`, int32; the count of programs is 0 between launches.
        places: `[max_rows, parts, 2]`, int32: see `share_bins.divide`.
    """

    histograms: torch.Tensor
    states: torch.Tensor
    places: torch.Tensor

    @classmethod
    def of(cls, max_rows: int, device: torch.device | str) -> KeyListsWorkspace:
        """Asks for the memory: 8 KiB for each row, and some bytes.

        Args:
            max_rows: Of a launch: queries * KV heads.
            device: Of the kernels.
        """

        def zeros(*size: int) -> torch.Tensor:
            return torch.zeros((max_rows, *size), dtype=torch.int32, device=device)

        return cls(zeros(PARTS, BINS), zeros(WORDS), zeros(PARTS, 2))


@dataclass(frozen=True)
class KeyRows:
    """Rows of keys that are to be listed: one for each query and KV head.

    Attributes:
        lengths: `[num_queries]`, int32: keys of a query's rows.
        counts: `[num_queries]`, an integer type: keys to select besides those in the ranges.
        ranges: `[2 * num_ranges, num_queries]`, int32: see `page_lists.list_pages`.
        every: See there.
        kv_heads: Of the layer.
        heads: Query heads of a KV head, at least 2.
        workspace: For as many rows.
    """

    lengths: torch.Tensor
    counts: torch.Tensor
    ranges: torch.Tensor
    every: torch.Tensor | None
    kv_heads: int
    heads: int
    workspace: KeyListsWorkspace

    def __post_init__(self) -> None:
        """Looks whether they can be listed.

        Raises:
            ValueError: There are too many ranges or rows, or groups have one head.
        """
        if len(self.ranges) > 2 * MOST_RANGES:
            raise ValueError(
                f"{len(self.ranges) // 2} ranges, but no more than {MOST_RANGES} are listed here"
            )
        if self.heads < 2:
            raise ValueError(f"{self.heads} query head for each KV head is no group")
        if len(self.workspace.states) < len(self):
            raise ValueError(
                f"a workspace for {len(self.workspace.states)} rows cannot hold {len(self)}"
            )

    def __len__(self) -> int:
        """How many there are."""
        return len(self.lengths) * self.kv_heads

    @property
    def keys(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
        """What kernels need to know of a row's keys: lengths, `every`, ranges, and their stride."""
        every = self.lengths if self.every is None else self.every
        ranges = self.ranges if len(self.ranges) else self.lengths
        return self.lengths, every, ranges, self.ranges.stride(0)

    def constants(self) -> dict[str, int]:
        """What all kernels are compiled for."""
        return {
            "LISTS": self.kv_heads,
            "HEADS": self.heads,
            "RANGES": len(self.ranges) // 2,
            "HAS_EVERY": self.every is not None,
            "WORDS": WORDS,
        }

    def constants_of_numbers(self, tiles: int) -> dict[str, int]:
        """What kernels are compiled for that make numbers.

        Args:
            tiles: Of a row, see `PoolingWorkspace`.
        """
        return self.constants() | {
            "STEP": self.step,
            "PARTS": PARTS,
            "HEADS_TILE": power_of_2(self.heads),
            "AT_ONCE": tiles_at_once(tiles, self.heads),
            "POOLING_TILE": POOLING_TILE,
            "BINS": BINS,
        }

    @property
    def grid(self) -> tuple[int, int]:
        """Rows, and their parts, which decide nothing but who works on which keys."""
        parts = power_of_2(_PROGRAMS // max(1, len(self)))
        return len(self), max(_LEAST_PARTS, min(PARTS, parts))

    @property
    def step(self) -> int:
        """Keys that programs work on at once."""
        return max(16 * PART_WARPS, _SCORES_AT_ONCE // power_of_2(self.heads))


def number_scores(
    scores: torch.Tensor, rows: KeyRows, scaling: float, weights: PoolingWorkspace
) -> None:
    """Writes numbers that rank as the keys' shares do, and where the best end.

    Args:
        scores: `[num_queries, num_heads, capacity]`, float32, no NaN and no +inf, contiguous; the
            numbers, int32, take the place of those of each group's first head.
        rows: To be listed.
        scaling: Of the scores.
        weights: What `pooling.weigh_scores` has found of them.

    Raises:
        ValueError: The weights do not fit the scores.
    """
    weights.check(scores)
    capacity, tiles = scores.shape[2], weights.peaks.shape[1]
    workspace, (lengths, every, ranges, ranges_stride) = rows.workspace, rows.keys
    _number_scores[rows.grid](
        scores,
        lengths,
        rows.counts,
        every,
        ranges,
        weights.peaks,
        weights.masses,
        workspace.histograms,
        workspace.states,
        workspace.places,
        scaling * math.log2(math.e),
        capacity,
        ranges_stride,
        tiles,
        **rows.constants_of_numbers(tiles),
        num_warps=PART_WARPS,
        maxnreg=_REGISTERS,
        **overlapped(scores.device),
    )
