"""Counting on the device what maskers read; `lists` counts what attention does."""

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
def _add_kernel(first, second, lengths, reads, stride, LISTS: tl.constexpr, COLUMNS: tl.constexpr):
    index = tl.program_id(0).to(tl.int64)
    if tl.load(lengths + index) > 0:
        own = reads + index * stride + 2
        more = _sum_of(first, index, LISTS, COLUMNS) + _sum_of(second, index, LISTS, COLUMNS)
        tl.store(own, tl.load(own) + more)


def add_scored(
    first: torch.Tensor,
    second: torch.Tensor,
    lists: int,
    lengths: torch.Tensor,
    reads: torch.Tensor,
) -> None:
    """Counts rows that were loaded in order to select.

    Args:
        first: `[>= num_queries * lists]`, int32: rows of each list.
        second: Likewise.
        lists: Of a query.
        lengths: `[num_queries]`, int32; nothing is counted for padding (0).
        reads: `[num_queries, 3]`, int64; the last column is added to.
    """
    _add_kernel[(len(lengths),)](
        first,
        second,
        lengths,
        reads,
        reads.stride(0),
        LISTS=lists,
        COLUMNS=power_of_2(lists),
    )
