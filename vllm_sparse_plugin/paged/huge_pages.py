"""Asking Linux for large memory pages: rows that lie far apart then miss fewer address look-ups."""

from __future__ import annotations

import ctypes
import mmap

import torch


def prefer_huge_pages(tensor: torch.Tensor) -> None:
    """Advises Linux to back a tensor with large pages as it is first written; a hint, no more.

    Args:
        tensor: On the CPU, contiguous.
    """
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is None:  # not Linux
        return
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    length = tensor.data_ptr() + tensor.nbytes - start
    if length > 0:
        # Without effect where the system does not allow it.
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), advice)
