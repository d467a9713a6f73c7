"""Lists of ranges and of the best pages beside them, made the long way: by flags of single keys."""

import numpy as np
import torch

from tests.plugin.triton.interpreter import DEVICE
from tests.plugin.triton.unit_flags import IN_CHUNKS
from vllm_sparse_plugin.paged.triton_kernels.flags import flag_range, start_flags
from vllm_sparse_plugin.paged.triton_kernels.lists import DeviceLists, list_tokens
from vllm_sparse_plugin.paged.triton_kernels.pooling import PoolingWorkspace
from vllm_sparse_plugin.paged.triton_kernels.radix_workspace import RadixWorkspace
from vllm_sparse_plugin.paged.triton_kernels.selection import flag_largest

POISON = 1 << 20
"""Where nothing is written."""
SCALING = 0.3


def lists_of(queries: int, kv_heads: int, capacity: int) -> DeviceLists:
    lists = DeviceLists.of(queries, kv_heads, 1, capacity, False, DEVICE)
    for part in (lists.tokens, lists.counts):
        part.fill_(POISON)
    return lists


def on_device(array: np.ndarray) -> torch.Tensor:
    """A copy, which kernels may overwrite."""
    return torch.tensor(array, device=DEVICE)


def reads_of(queries: int) -> torch.Tensor:
    """Counts that something was added to before."""
    return torch.full((queries, 3), 7, device=DEVICE)


def lists_by_flags(
    scores: np.ndarray,
    page_size: int,
    kv_heads: int,
    wanted: np.ndarray,
    lengths: np.ndarray,
    ranges: np.ndarray,
    every: np.ndarray | None,
    workspace: RadixWorkspace = IN_CHUNKS,
) -> tuple[DeviceLists, torch.Tensor]:
    """The lists, and the counts of what is read.

    Args:
        scores: `[queries, heads, pages]`.
        page_size: Keys of a page.
        kv_heads: That select.
        wanted: Pages, `[queries]`.
        lengths: `[queries]`, int32.
        ranges: `[2 * ranges, queries]`.
        every: `[queries]`, int32, or None.
        workspace: Of the selection.
    """
    queries, heads, pages = scores.shape
    capacity = -(-pages * page_size // 16) * 16
    held = on_device(lengths)
    flags = torch.zeros(queries * kv_heads, capacity, dtype=torch.uint8, device=DEVICE)
    start_flags(flags, held, on_device(ranges.astype(np.int32)))
    if every is not None:
        ends = on_device(every)
        flag_range(flags, held, torch.zeros_like(ends), ends)
    flag_largest(
        on_device(scores),
        page_size,
        kv_heads,
        on_device(wanted.astype(np.int32)),
        SCALING,
        held,
        flags,
        workspace,
        PoolingWorkspace.of(queries, heads, pages, DEVICE),
    )
    lists, reads = lists_of(queries, kv_heads, capacity), reads_of(queries)
    list_tokens(flags, held, lists, reads=reads, readers=heads // kv_heads)
    return lists, reads
