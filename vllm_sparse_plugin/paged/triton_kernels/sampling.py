"""The samples of the sampling maskers, marked in the flags of query heads or of KV heads.

Units that are KV heads have the numbers of their first query heads.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from vllm_sparse_plugin.paged.triton_kernels.counter_random import layer_stream, stream_of
from vllm_sparse_plugin.paged.triton_kernels.grids import launched
from vllm_sparse_plugin.paged.triton_kernels.radix import (
    BINS,
    LEVELS,
    SHARE,
    SPLIT_REGISTERS,
    SPLIT_WARPS,
    TILE,
    WORDS,
    add_first_digits,
    bound_of_row,
    bound_of_state,
    candidates_of,
    count_digits,
    count_kernel,
    live_parts,
    part_of,
    wanted_of,
)
from vllm_sparse_plugin.paged.triton_kernels.radix_workspace import RadixWorkspace
from vllm_sparse_plugin.paged.triton_kernels.random_order import (
    last_of_equals,
    mark_numbers,
    order_numbers,
)


@triton.jit
def _stream_of_unit(layer, unit, length, UNITS: tl.constexpr, HEADS: tl.constexpr):
    return stream_of(layer, unit % UNITS * HEADS, length - 1)


@triton.jit
def _report_nothing(sizes, unit):
    tl.store(sizes + 2 * unit, 0)
    tl.store(sizes + 2 * unit + 1, 0)


@triton.jit
def _report(probability, sizes, unit, wanted, candidates, MODE: tl.constexpr):
    """Says with what probability, or how many, keys were drawn."""
    if MODE == 1:
        share = wanted.to(tl.float64) / candidates.to(tl.float64)
        tl.store(probability + unit, share.to(tl.float32))
    if MODE == 2:
        tl.store(sizes + 2 * unit, wanted)
        tl.store(sizes + 2 * unit + 1, candidates)


@launched
def _draw_kernel(
    order,
    flags,
    lengths,
    counts,
    probability,
    sizes,
    layer: tl.int64,
    stride,
    UNITS: tl.constexpr,
    HEADS: tl.constexpr,
    MODE: tl.constexpr,
    SHARE: tl.constexpr,
    KEYS: tl.constexpr,
    FLAG: tl.constexpr,
    BINS: tl.constexpr,
    TILE: tl.constexpr,
):
    """A unit's draw by one program."""
    unit = tl.program_id(0).to(tl.int64)
    length = tl.load(lengths + unit // UNITS)
    if MODE == 2:
        _report_nothing(sizes, unit)
    if length > 0:
        stream = _stream_of_unit(layer, unit, length, UNITS, HEADS)
        order += unit * stride
        flags += unit * stride
        if MODE != 0:
            order_numbers(order, flags, 0, length, stream, TILE)
            tl.debug_barrier()  # what one thread has written, another one reads
        histogram = count_digits(order, 0, length, 0, 0, BINS, TILE)
        candidates = candidates_of(histogram, BINS)
        if candidates > 0:
            wanted = wanted_of(counts, unit, candidates, MODE, SHARE, KEYS)
            bound, room, equal = bound_of_row(order, length, histogram, wanted, BINS, TILE)
            last, place = last_of_equals(order, length, stream, bound, room, equal, TILE)
            mark_numbers(order, flags, 0, length, stream, bound, last, place, FLAG, TILE)
            _report(probability, sizes, unit, wanted, candidates, MODE)


@launched
def _order_kernel(
    order,
    flags,
    lengths,
    counts,
    histograms,
    states,
    layer: tl.int64,
    stride,
    UNITS: tl.constexpr,
    HEADS: tl.constexpr,
    MODE: tl.constexpr,
    SHARE: tl.constexpr,
    KEYS: tl.constexpr,
    BINS: tl.constexpr,
    TILE: tl.constexpr,
    WORDS: tl.constexpr,
):
    """A part's numbers, and the row's first digit."""
    unit, parts = tl.program_id(0).to(tl.int64), tl.num_programs(1)
    length = tl.load(lengths + unit // UNITS)
    begin, end = part_of(length, tl.program_id(1), parts, TILE)
    if begin < end:
        order += unit * stride
        if MODE != 0:
            stream = _stream_of_unit(layer, unit, length, UNITS, HEADS)
            order_numbers(order, flags + unit * stride, begin, end, stream, TILE)
            tl.debug_barrier()
        histogram = count_digits(order, begin, end, 0, 0, BINS, TILE)
        own, state = histograms + unit * 4 * BINS, states + unit * WORDS
        live = live_parts(length, parts, TILE)
        add_first_digits(histogram, own, state, live, counts, unit, MODE, SHARE, KEYS, BINS)


@launched
def _mark_kernel(
    order,
    flags,
    lengths,
    states,
    probability,
    sizes,
    layer: tl.int64,
    stride,
    UNITS: tl.constexpr,
    HEADS: tl.constexpr,
    MODE: tl.constexpr,
    FLAG: tl.constexpr,
    TILE: tl.constexpr,
    WORDS: tl.constexpr,
):
    """Marks a part's keys; the first part's program reports."""
    unit, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    length = tl.load(lengths + unit // UNITS)
    begin, end = part_of(length, part, tl.num_programs(1), TILE)
    if MODE == 2 and begin == 0:
        _report_nothing(sizes, unit)
    if begin < end:
        state = states + unit * WORDS
        wanted, candidates = tl.load(state + 3), tl.load(state + 4)
        if candidates > 0:
            bound, room, equal = bound_of_state(state)
            order += unit * stride
            stream = _stream_of_unit(layer, unit, length, UNITS, HEADS)
            last, place = last_of_equals(order, length, stream, bound, room, equal, TILE)
            mark_numbers(
                order, flags + unit * stride, begin, end, stream, bound, last, place, FLAG, TILE
            )
            if begin == 0:
                _report(probability, sizes, unit, wanted, candidates, MODE)


def draw(
    num_heads: int,
    lengths: torch.Tensor,
    flags: torch.Tensor,
    order: torch.Tensor,
    workspace: RadixWorkspace,
    *,
    stream: int,
    mode: int,
    share: float = 0.0,
    keys: int = 0,
    flag: int,
    counts: torch.Tensor | None = None,
    probability: torch.Tensor | None = None,
    sizes: torch.Tensor | None = None,
) -> None:
    """Draws keys for each unit, and flags them.

    Args:
        num_heads: Query heads.
        lengths: `[num_queries]`, int32.
        flags: `[num_queries * num_units, capacity]`, uint8; written.
        order: Likewise, int32: scratch. In mode `GIVEN` it is that of an earlier draw of the same
            units, and the keys of that draw are drawn again, before any others.
        workspace: For rows that are split.
        stream: See `layer_stream`.
        mode: How many, see `radix.wanted_of`.
        share: Likewise.
        keys: Likewise.
        flag: Of the keys that are drawn; those that have `BASE_FLAG` get 1.
        counts: `[num_queries * num_units]`, int32, in mode `GIVEN`.
        probability: `[num_queries * num_units]`, float32, of drawn keys; in mode `SHARE` written
            where there are any.
        sizes: `[num_queries * num_units, 2]`, int32, in mode `BASE`: keys drawn, and keys that were
            unselected; written.
    """
    rows, capacity = flags.shape
    units = rows // len(lengths)
    counts, probability, sizes = (
        lengths if tensor is None else tensor for tensor in (counts, probability, sizes)
    )
    shape: dict[str, Any] = {"UNITS": units, "HEADS": num_heads // units, "MODE": mode}
    sizing: dict[str, Any] = {"SHARE": share, "KEYS": keys}
    tiles = {"BINS": BINS, "TILE": TILE}
    if not workspace.splits(rows, capacity):
        _draw_kernel[(rows,)](
            order,
            flags,
            lengths,
            counts,
            probability,
            sizes,
            stream,
            capacity,
            FLAG=flag,
            **shape,
            **sizing,
            **tiles,
        )
        return
    histograms, states, grid = workspace.histograms, workspace.states, (rows, workspace.parts)
    _order_kernel[grid](
        order,
        flags,
        lengths,
        counts,
        histograms,
        states,
        stream,
        capacity,
        WORDS=WORDS,
        **shape,
        **sizing,
        **tiles,
        num_warps=SPLIT_WARPS,
    )
    for level in range(1, LEVELS):
        count_kernel[grid](
            order,
            lengths,
            histograms,
            states,
            workspace.equals,
            capacity,
            PAGE_SIZE=1,
            ROWS=units,
            HEADS=1,
            LEVEL=level,
            WORDS=WORDS,
            **tiles,
            num_warps=SPLIT_WARPS,
            maxnreg=SPLIT_REGISTERS,
        )
    _mark_kernel[grid](
        order,
        flags,
        lengths,
        states,
        probability,
        sizes,
        stream,
        capacity,
        FLAG=flag,
        TILE=TILE,
        WORDS=WORDS,
        **shape,
        num_warps=SPLIT_WARPS,
    )


def sample_share(
    share: float,
    seed: int,
    layer: int,
    num_heads: int,
    lengths: torch.Tensor,
    flags: torch.Tensor,
    probability: torch.Tensor,
    order: torch.Tensor,
    workspace: RadixWorkspace,
) -> None:
    """Samples a share of each unit's unselected keys, at least one.

    Args:
        share: In (0, 1].
        seed: Of the numbers, in [0, 2**63).
        layer: Index of the attention layer.
        num_heads: Query heads.
        lengths: `[num_queries]`, int32.
        flags: `[num_queries * num_units, capacity]`, uint8; written.
        probability: `[num_queries * num_units]`, float32; written where keys are sampled.
        order: Like `flags`, int32: scratch.
        workspace: For rows that are split.
    """
    draw(
        num_heads,
        lengths,
        flags,
        order,
        workspace,
        stream=layer_stream(seed, layer),
        mode=SHARE,
        share=share,
        flag=2,
        probability=probability,
    )
