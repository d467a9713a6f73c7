"""Counting on the device what queries read."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_sparse_plugin.paged.triton_kernels.grids import launched, power_of_2


@triton.jit
def _sum_of(values, index, COUNT: tl.constexpr, COLUMNS: tl.constexpr):
    columns = tl.arange(0, COLUMNS)
    own = tl.load(values + index * COUNT + columns, mask=columns < COUNT, other=0)
    return tl.sum(own.to(tl.int64), 0)


@launched
def _add_kernel(
    keys,
    loaded,
    scored,
    lengths,
    totals,
    stride,
    factor,
    KEYS: tl.constexpr,
    LOADED: tl.constexpr,
    SCORED: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64)
    if tl.load(lengths + index) > 0:
        own = totals + index * stride
        if KEYS > 0:
            tl.store(own, tl.load(own) + _sum_of(keys, index, KEYS, COLUMNS) * factor)
            more = _sum_of(loaded, index, LOADED, COLUMNS)
            tl.store(own + 1, tl.load(own + 1) + more)
        if SCORED > 0:
            more = _sum_of(loaded, index, SCORED, COLUMNS) + _sum_of(scored, index, SCORED, COLUMNS)
            tl.store(own + 2, tl.load(own + 2) + more)


def add_reads(
    selected: torch.Tensor,
    units: int,
    heads_per_unit: int,
    listed: torch.Tensor,
    lists: int,
    lengths: torch.Tensor,
    totals: torch.Tensor,
) -> None:
    """Counts what attention reads.

    Args:
        selected: `[>= num_queries * units]`, int32: keys that each unit has selected.
        units: Of a query.
        heads_per_unit: Query heads that read them.
        listed: `[>= num_queries * lists]`, int32: rows of each list.
        lists: Of a query.
        lengths: `[num_queries]`, int32; nothing is counted for padding (0).
        totals: `[num_queries, 3]`, int64; the first two columns are added to: keys that query heads
            read, and rows of key and value that are loaded.
    """
    _launch(
        selected,
        listed,
        listed,
        lengths,
        totals,
        heads_per_unit,
        KEYS=units,
        LOADED=lists,
        SCORED=0,
    )


def add_scored(
    first: torch.Tensor,
    second: torch.Tensor,
    lists: int,
    lengths: torch.Tensor,
    totals: torch.Tensor,
) -> None:
    """Counts rows that were loaded in order to select.

    Args:
        first: `[>= num_queries * lists]`, int32: rows of each list.
        second: Likewise.
        lists: Of a query.
        lengths: See `add_reads`.
        totals: `[num_queries, 3]`, int64; the last column is added to.
    """
    _launch(first, first, second, lengths, totals, 1, KEYS=0, LOADED=0, SCORED=lists)


def _launch(
    keys: torch.Tensor,
    loaded: torch.Tensor,
    scored: torch.Tensor,
    lengths: torch.Tensor,
    totals: torch.Tensor,
    factor: int,
    **counts: int,
) -> None:
    _add_kernel[(len(lengths),)](
        keys,
        loaded,
        scored,
        lengths,
        totals,
        totals.stride(0),
        factor,
        **counts,
        COLUMNS=power_of_2(max(counts.values())),
    )
