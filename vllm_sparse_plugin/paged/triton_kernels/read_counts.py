"""Counting on the device what queries read."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_sparse_plugin.paged.triton_kernels.grids import power_of_2


@triton.jit
def _add_kernel(
    values,
    lengths,
    totals,
    stride,
    factor,
    COUNT: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64)
    if tl.load(lengths + index) > 0:
        columns = tl.arange(0, COLUMNS)
        own = tl.load(values + index * COUNT + columns, mask=columns < COUNT, other=0)
        at = totals + index * stride
        tl.store(at, tl.load(at) + tl.sum(own.to(tl.int64), 0) * factor)


def add_sums(
    values: torch.Tensor, count: int, factor: int, lengths: torch.Tensor, totals: torch.Tensor
) -> None:
    """Adds to each query's total the sum of its numbers, times a factor.

    Args:
        values: `[>= num_queries * count]`, int32.
        count: Numbers of a query.
        factor: Whole.
        lengths: `[num_queries]`, int32; nothing is added for padding (0).
        totals: `[num_queries, 1]`, int64, of any stride; written.
    """
    _add_kernel[(len(lengths),)](
        values,
        lengths,
        totals,
        totals.stride(0),
        factor,
        COUNT=count,
        COLUMNS=power_of_2(count),
    )
