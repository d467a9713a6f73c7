"""Asking Linux for large memory pages: rows that lie far apart then miss fewer address look-ups."""

from __future__ import annotations

import ctypes
import mmap

import torch

_COLLAPSE = 25
"""`MADV_COLLAPSE` of Linux 6.1 and later, which Python's mmap does not name yet."""


def prefer_huge_pages(tensor: torch.Tensor) -> None:
    """Asks Linux to back a tensor with large pages: what it has already, and what it gets later.

    Tensors are filled with zeros when they are made, so that advice about memory that is still to
    come would come too late. Copying what is there takes about half a second per GiB.

    Args:
        tensor: On the CPU, contiguous.
    """
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is None:  # not Linux
        return
    advise = ctypes.CDLL(None).madvise
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    length = tensor.data_ptr() + tensor.nbytes - start
    if length > 0:
        for wanted in (advice, _COLLAPSE):  # without effect where the system does not allow it
            advise(ctypes.c_void_p(start), ctypes.c_size_t(length), wanted)
