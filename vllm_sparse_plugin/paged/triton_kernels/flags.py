"""Starting and marking flags, and flags of query heads as flags of their KV heads."""

from __future__ import annotations

import torch
import triton.language as tl

from vllm_sparse_plugin.paged.triton_kernels.grids import launched, programs_per_row

_TILE = 4096


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
    for first in range(begin + tl.program_id(1) * TILE, end, tl.num_programs(1) * TILE):
        keys = first + tl.arange(0, TILE)
        tl.store(row + keys, tl.full([TILE], VALUE, tl.uint8), mask=keys < end)


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
    for first in range(tl.program_id(1) * TILE, length, tl.num_programs(1) * TILE):
        keys = first + tl.arange(0, TILE)
        found = tl.zeros([TILE], tl.uint8)
        for place in tl.static_range(RANGES):
            own = ranges + 2 * place * ranges_stride + index
            begin, end = tl.load(own), tl.load(own + ranges_stride)
            found |= ((keys >= begin) & (keys < end)).to(tl.uint8)
        tl.store(row + keys, found, mask=keys < length)


@launched
def _pool_kernel(
    flags, pooled, lengths, stride, UNITS: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr
):
    unit = tl.program_id(0).to(tl.int64)
    length = tl.load(lengths + unit // UNITS)
    for first in range(tl.program_id(1) * TILE, length, tl.num_programs(1) * TILE):
        keys = first + tl.arange(0, TILE)
        mask = keys < length
        found = tl.zeros([TILE], tl.uint8)
        for head in range(GROUP):
            found |= tl.load(flags + (unit * GROUP + head) * stride + keys, mask=mask, other=0)
        tl.store(pooled + unit * stride + keys, found, mask=mask)


@launched
def _spread_kernel(
    pooled, flags, lengths, stride, UNITS: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr
):
    unit = tl.program_id(0).to(tl.int64)
    length = tl.load(lengths + unit // UNITS)
    for first in range(tl.program_id(1) * TILE, length, tl.num_programs(1) * TILE):
        keys = first + tl.arange(0, TILE)
        mask = keys < length
        found = tl.load(pooled + unit * stride + keys, mask=mask, other=0)
        for head in range(GROUP):
            tl.store(flags + (unit * GROUP + head) * stride + keys, found, mask=mask)


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
