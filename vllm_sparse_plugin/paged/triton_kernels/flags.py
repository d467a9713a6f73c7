"""Starting and marking flags, and flags of query heads as flags of their KV heads.

Flags are moved 16 at a time. The last ones of a row, fewer than 16, are moved by themselves: a mask
that differs between neighbours would make each flag an access of its own.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_sparse_plugin.paged.triton_kernels.grids import launched, programs_per_row

_TILE = 4096


@triton.jit
def _is_last():
    """Whether a program is the one that moves the rest of its row: it has the fewest tiles."""
    return tl.program_id(1) == tl.num_programs(1) - 1


@launched
def _fill_kernel(
    flags,
    lengths,
    begins,
    ends,
    stride,
    UNITS: tl.constexpr,
    VALUE: tl.constexpr,
    TILE: tl.constexpr,
):
    unit = tl.program_id(0).to(tl.int64)
    index = unit // UNITS
    begin = tl.maximum(tl.load(begins + index).to(tl.int32), 0)
    end = tl.minimum(tl.load(ends + index).to(tl.int32), tl.load(lengths + index))
    row = flags + unit * stride
    inner, whole = (begin + 15) // 16 * 16, end // 16 * 16
    for first in range(inner + tl.program_id(1) * TILE, whole, tl.num_programs(1) * TILE):
        keys = first // 16 * 16 + tl.arange(0, TILE)  # so that Triton knows of the 16
        tl.store(row + keys, tl.full([TILE], VALUE, tl.uint8), mask=keys < whole)
    if _is_last():
        of_edge = tl.arange(0, 16)
        value = tl.full([16], VALUE, tl.uint8)
        keys = begin // 16 * 16 + of_edge
        tl.store(row + keys, value, mask=(keys >= begin) & (keys < end))
        keys = whole + of_edge
        tl.store(row + keys, value, mask=(keys >= begin) & (keys < end))


@triton.jit
def _flags_of_ranges(keys, ranges, stride, RANGES: tl.constexpr):
    found = tl.zeros(keys.shape, tl.uint8)
    for place in tl.static_range(RANGES):
        own = ranges + 2 * place * stride
        begin, end = tl.load(own), tl.load(own + stride)
        found |= ((keys >= begin) & (keys < end)).to(tl.uint8)
    return found


@triton.jit
def _meets_ranges(first, behind, ranges, stride, RANGES: tl.constexpr):
    """Whether any of the keys from `first` to before `behind` may be in a range."""
    meets = first > behind
    for place in tl.static_range(RANGES):
        own = ranges + 2 * place * stride
        meets |= (tl.load(own) < behind) & (tl.load(own + stride) > first)
    return meets


@launched
def _start_kernel(
    flags,
    lengths,
    ranges,
    stride,
    ranges_stride,
    UNITS: tl.constexpr,
    RANGES: tl.constexpr,
    TILE: tl.constexpr,
):
    unit = tl.program_id(0).to(tl.int64)
    index = unit // UNITS
    length = tl.load(lengths + index)
    row = flags + unit * stride
    ranges += index
    whole = length // 16 * 16
    for first in range(tl.program_id(1) * TILE, whole, tl.num_programs(1) * TILE):
        keys = first + tl.arange(0, TILE)
        if _meets_ranges(first, first + TILE, ranges, ranges_stride, RANGES):
            found = _flags_of_ranges(keys, ranges, ranges_stride, RANGES)
            tl.store(row + keys, found, mask=keys < whole)
        else:  # most of a row: nothing to compare for each of its keys
            tl.store(row + keys, tl.zeros([TILE], tl.uint8), mask=keys < whole)
    if _is_last():
        keys = whole + tl.arange(0, 16)
        found = _flags_of_ranges(keys, ranges, ranges_stride, RANGES)
        tl.store(row + keys, found, mask=keys < length)


@triton.jit
def _pool_keys(flags, pooled, keys, end, stride, GROUP: tl.constexpr):
    mask = keys < end
    found = tl.zeros(keys.shape, tl.uint8)
    for head in tl.static_range(GROUP):
        found |= tl.load(flags + head * stride + keys, mask=mask, other=0)
    tl.store(pooled + keys, found, mask=mask)


@launched
def _pool_kernel(
    flags, pooled, lengths, stride, UNITS: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr
):
    unit = tl.program_id(0).to(tl.int64)
    length = tl.load(lengths + unit // UNITS)
    flags += unit * GROUP * stride
    pooled += unit * stride
    whole = length // 16 * 16
    for first in range(tl.program_id(1) * TILE, whole, tl.num_programs(1) * TILE):
        _pool_keys(flags, pooled, first + tl.arange(0, TILE), whole, stride, GROUP)
    if _is_last():
        _pool_keys(flags, pooled, whole + tl.arange(0, 16), length, stride, GROUP)


@triton.jit
def _spread_keys(pooled, flags, keys, end, stride, GROUP: tl.constexpr):
    mask = keys < end
    found = tl.load(pooled + keys, mask=mask, other=0)
    for head in tl.static_range(GROUP):
        tl.store(flags + head * stride + keys, found, mask=mask)


@launched
def _spread_kernel(
    pooled, flags, lengths, stride, UNITS: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr
):
    unit = tl.program_id(0).to(tl.int64)
    length = tl.load(lengths + unit // UNITS)
    flags += unit * GROUP * stride
    pooled += unit * stride
    whole = length // 16 * 16
    for first in range(tl.program_id(1) * TILE, whole, tl.num_programs(1) * TILE):
        _spread_keys(pooled, flags, first + tl.arange(0, TILE), whole, stride, GROUP)
    if _is_last():
        _spread_keys(pooled, flags, whole + tl.arange(0, 16), length, stride, GROUP)


def start_flags(
    flags: torch.Tensor, lengths: torch.Tensor, ranges: torch.Tensor | None = None
) -> None:
    """Selects some ranges of each query's keys for all its units, and no other key.

    Args:
        flags: `[num_queries * num_units, capacity]`, uint8; written before each length.
        lengths: `[num_queries]`, int32.
        ranges: `[2 * num_ranges, num_queries]`, an integer type: of each range, where it begins,
            and where it ends.
    """
    rows, capacity = flags.shape
    grid = (rows, programs_per_row(rows, capacity, _TILE))
    held = lengths[None] if ranges is None or len(ranges) == 0 else ranges
    _start_kernel[grid](
        flags,
        lengths,
        held,
        capacity,
        held.stride(0),
        UNITS=rows // len(lengths),
        RANGES=0 if ranges is None else len(ranges) // 2,
        TILE=_TILE,
    )


def flag_range(
    flags: torch.Tensor, lengths: torch.Tensor, begins: torch.Tensor, ends: torch.Tensor
) -> None:
    """Selects the keys at positions [begin, end) of each query, for all its units.

    Args:
        flags: `[num_queries * num_units, capacity]`, uint8; written.
        lengths: `[num_queries]`, int32.
        begins: `[num_queries]`, an integer type; below 0 counts as 0.
        ends: Likewise; past the length counts as the length.
    """
    rows, capacity = flags.shape
    grid = (rows, programs_per_row(rows, capacity, _TILE))
    units = rows // len(lengths)
    _fill_kernel[grid](flags, lengths, begins, ends, capacity, units, 1, _TILE)


def pool_flags(flags: torch.Tensor, lengths: torch.Tensor, pooled: torch.Tensor) -> None:
    """Gives a KV head what any query head of its group has selected.

    Args:
        flags: `[num_queries * num_heads, capacity]`, uint8, 0 or 1.
        lengths: `[num_queries]`, int32.
        pooled: `[num_queries * num_kv_heads, capacity]`, uint8; written before each length.
    """
    rows, capacity = pooled.shape
    grid = (rows, programs_per_row(rows, capacity, _TILE))
    units, group = rows // len(lengths), len(flags) // rows
    _pool_kernel[grid](flags, pooled, lengths, capacity, units, group, _TILE)


def spread_flags(pooled: torch.Tensor, lengths: torch.Tensor, flags: torch.Tensor) -> None:
    """Gives every query head what its KV head has selected.

    Args:
        pooled: `[num_queries * num_kv_heads, capacity]`, uint8.
        lengths: `[num_queries]`, int32.
        flags: `[num_queries * num_heads, capacity]`, uint8; written before each length.
    """
    rows, capacity = pooled.shape
    grid = (rows, programs_per_row(rows, capacity, _TILE))
    units, group = rows // len(lengths), len(flags) // rows
    _spread_kernel[grid](pooled, flags, lengths, capacity, units, group, _TILE)
