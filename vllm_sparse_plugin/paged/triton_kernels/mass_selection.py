"""Choosing the heaviest keys of a row that hold a share of its attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from vllm_sparse_plugin.paged.triton_kernels.grids import launched, power_of_2, programs_per_row
from vllm_sparse_plugin.paged.triton_kernels.radix import order_of, score_of

_TILE = 1024
_LEVELS = 8
"""Digits of a number, of 4 bits each: a program adds up the weights of each digit by itself, since
weights of like keys would all be added to a few places of a larger histogram."""
_WEIGHT_BITS = 62


@launched
def _order_kernel(
    scores,
    flags,
    lengths,
    peaks,
    scaling,
    row_stride,
    stride,
    HEADS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Replaces scores by numbers: 0 for selected keys. Each program leaves its largest number."""
    row = tl.program_id(0).to(tl.int64)
    length = tl.load(lengths + row // HEADS)
    peak = tl.zeros([], tl.uint32)
    for first in range(tl.program_id(1) * TILE, length, tl.num_programs(1) * TILE):
        keys = first + tl.arange(0, TILE)
        mask = keys < length
        at = scores + row * row_stride + keys
        own = tl.load(at, mask=mask, other=0).to(tl.float32, bitcast=True)
        is_open = tl.load(flags + row * stride + keys, mask=mask, other=1) == 0
        number = tl.where(is_open, order_of(own * scaling), 0)
        tl.store(at, number.to(tl.int32, bitcast=True), mask=mask)
        peak = tl.maximum(peak, tl.max(number, 0))
    at = row * tl.num_programs(1) + tl.program_id(1)
    tl.store(peaks + at, peak.to(tl.int32, bitcast=True))


@triton.jit
def _bound_of(masses, top_p, LEVEL: tl.constexpr):
    """The highest digits of the bound, from the masses of each digit in the rows before.

    The largest bound such that what is not below it weighs more than is wanted.
    """
    digits = tl.arange(0, 16)
    total = tl.sum(tl.load(masses + digits), 0)
    wanted = top_p * total.to(tl.float64)
    bound = tl.zeros([], tl.uint32)
    above = tl.zeros([], tl.int64)
    for level in tl.static_range(LEVEL):
        mass = tl.load(masses + level * 16 + digits)
        at_least = above + tl.sum(mass, 0) - tl.cumsum(mass, 0) + mass
        is_more = (at_least.to(tl.float64) > wanted) & (digits > 0)
        digit = tl.sum(is_more.to(tl.int32), 0)
        above += tl.sum(tl.where(digits > digit, mass, 0), 0)
        bound = bound | (digit.to(tl.uint32) << (28 - 4 * level))
    return bound


@launched
def _weigh_kernel(
    order,
    lengths,
    peaks,
    masses,
    row_stride,
    programs,
    HEADS: tl.constexpr,
    LEVEL: tl.constexpr,
    LEVELS: tl.constexpr,
    TOP_P: tl.constexpr,
    BITS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Adds up the weights of each digit, of keys whose higher digits are those of the bound.

    Weights are whole numbers, so that sums are the same in any order.
    """
    row = tl.program_id(0).to(tl.int64)
    length = tl.load(lengths + row // HEADS)
    if tl.program_id(1) * TILE < length:
        others = tl.arange(0, PROGRAMS)
        found = tl.load(peaks + row * programs + others, mask=others < programs, other=0)
        peak = tl.max(found.to(tl.uint32, bitcast=True), 0)
        own_masses = masses + row * LEVELS * 16
        bound = tl.zeros([], tl.uint32)
        if LEVEL > 0:
            bound = _bound_of(own_masses, tl.full([], TOP_P, tl.float64), LEVEL)
        highest = score_of(peak)
        digits = tl.arange(0, 16)
        sums = tl.zeros([16], tl.int64)
        for first in range(tl.program_id(1) * TILE, length, tl.num_programs(1) * TILE):
            keys = first + tl.arange(0, TILE)
            own = tl.load(order + row * row_stride + keys, mask=keys < length, other=0)
            own = own.to(tl.uint32, bitcast=True)
            is_counted = own > 0
            if LEVEL > 0:
                is_counted = is_counted & ((own >> (32 - 4 * LEVEL)) == (bound >> (32 - 4 * LEVEL)))
            # The heaviest have weight 1, infinite ones too.
            is_less = is_counted & (own < peak)
            logits = tl.where(is_less, score_of(own), 0.0)
            weight = tl.exp(logits - tl.where(is_less, highest, 0.0)).to(tl.float64)
            whole = (weight * tl.full([], 2.0**BITS, tl.float64) + 0.5).to(tl.int64)
            whole = tl.where(is_counted, whole, 0)
            digit = ((own >> (28 - 4 * LEVEL)) & 15).to(tl.int32)
            of_digits = tl.where(digit[None, :] == digits[:, None], whole[None, :], 0)
            sums += tl.sum(of_digits, 1)
        tl.atomic_add(own_masses + LEVEL * 16 + digits, sums, mask=sums > 0, sem="relaxed")


@launched
def _mark_kernel(
    order,
    flags,
    lengths,
    masses,
    row_stride,
    stride,
    HEADS: tl.constexpr,
    LEVELS: tl.constexpr,
    TOP_P: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    length = tl.load(lengths + row // HEADS)
    if tl.program_id(1) * TILE < length:
        bound = tl.zeros([], tl.uint32)
        if TOP_P < 1:
            share = tl.full([], TOP_P, tl.float64)
            bound = _bound_of(masses + row * LEVELS * 16, share, LEVELS)
        for first in range(tl.program_id(1) * TILE, length, tl.num_programs(1) * TILE):
            keys = first + tl.arange(0, TILE)
            own = tl.load(order + row * row_stride + keys, mask=keys < length, other=0)
            own = own.to(tl.uint32, bitcast=True)
            chosen = (own > 0) & (own >= bound)
            tl.store(flags + row * stride + keys, tl.full([TILE], 1, tl.uint8), mask=chosen)


@dataclass(frozen=True)
class MassWorkspace:
    """What programs tell each other.

    Attributes:
        peaks: `[max_rows, programs]`, int32.
        masses: `[max_rows, digits of a number, 16]`, int64.
    """

    peaks: torch.Tensor
    masses: torch.Tensor

    @classmethod
    def of(
        cls, max_queries: int, num_heads: int, capacity: int, device: torch.device | str
    ) -> MassWorkspace:
        """Asks for the memory.

        Args:
            max_queries: Queries of a launch, at most.
            num_heads: Query heads.
            capacity: Of the flags.
            device: Of the kernels.
        """
        rows = max_queries * num_heads
        peaks = torch.empty((rows, -(-capacity // _TILE)), dtype=torch.int32, device=device)
        masses = torch.empty((rows, _LEVELS, 16), dtype=torch.int64, device=device)
        return cls(peaks, masses)


def flag_mass(
    scores: torch.Tensor,
    top_p: float,
    scaling: float,
    lengths: torch.Tensor,
    flags: torch.Tensor,
    workspace: MassWorkspace,
) -> None:
    """Selects the heaviest keys until they hold more than a share of what is not yet selected.

    Keys as heavy as the last one taken are taken too; the share 1 takes every key. A key's weight
    is rounded to 2**-45 of the heaviest one's (in rows of 128K keys; shorter ones: less).

    Args:
        scores: `[num_queries, num_heads, capacity]`, float32, no NaN, contiguous; overwritten.
        top_p: The share, of the weight of the keys not selected before.
        scaling: Of the scores.
        lengths: `[num_queries]`, int32.
        flags: `[num_queries * num_heads, capacity]`, uint8, of units that are query heads; written.
        workspace: For as many queries and keys.

    Raises:
        ValueError: The workspace is too small.
    """
    _, num_heads, capacity = scores.shape
    rows, stride = flags.shape
    programs = programs_per_row(rows, capacity, _TILE)
    if len(workspace.masses) < rows or workspace.peaks.shape[1] < programs:
        raise ValueError(
            f"a workspace of {tuple(workspace.peaks.shape)} does not fit flags of "
            f"{tuple(flags.shape)}"
        )
    order, grid = scores.view(torch.int32), (rows, programs)
    masses = workspace.masses
    _order_kernel[grid](
        order,
        flags,
        lengths,
        workspace.peaks,
        scaling,
        capacity,
        stride,
        HEADS=num_heads,
        TILE=_TILE,
    )
    if top_p < 1:
        masses[:rows].zero_()
        for level in range(_LEVELS):
            _weigh_kernel[grid](
                order,
                lengths,
                workspace.peaks,
                masses,
                capacity,
                programs,
                HEADS=num_heads,
                LEVEL=level,
                LEVELS=_LEVELS,
                TOP_P=top_p,
                BITS=_WEIGHT_BITS - (capacity - 1).bit_length(),
                # Of any launch: each number of programs would be compiled for.
                PROGRAMS=power_of_2(workspace.peaks.shape[1]),
                TILE=_TILE,
                num_warps=8,
            )
    _mark_kernel[grid](
        order,
        flags,
        lengths,
        masses,
        capacity,
        stride,
        HEADS=num_heads,
        LEVELS=_LEVELS,
        TOP_P=top_p,
        TILE=_TILE,
    )
