"""How kernels are launched: for what they are compiled, and by how many programs.

Both from shapes alone, never from lengths.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import triton
import triton.language as tl

_PROGRAMS = 2048
"""About as many as a large GPU runs at once: of four warps with few registers, 16 per processor."""

_SWITCH = "SPARSE_ATTENTION_OVERLAP_LAUNCHES"

launched = triton.jit(
    do_not_specialize=[
        "lengths",
        "whole",
        "every",
        "rows",
        "counts",
        "begins",
        "ends",
        "ranges",
        "ranges_stride",
        "totals",
        "sizes",
        "probability",
        "layer",
        "places",
        "digest",
        "reads",
        "count",
        "num_tokens",
        "programs",
    ]
)
"""Decorator of kernels; functions that they call have Triton's own.

Triton compiles a kernel again when an integer is 1, or a multiple of 16, or an address is a
multiple of 16 bytes, and another one was not. What these names stand for differs from step to step,
with the number of queries or tokens; and that is nothing to wait seconds for in the middle of
serving. All that is lost are wide loads of what kernels only load single numbers of.
"""


@triton.jit
def await_launches(IS_OVERLAPPED: tl.constexpr):
    """Waits until all launches before this one have ended, if it began before that.

    The first thing that such a kernel does, in every program: what a later launch needs may have
    been written by any earlier one. From then on, the next launch may begin, to wait in its turn.

    Args:
        IS_OVERLAPPED: See `overlapped`.
    """
    if IS_OVERLAPPED:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


def overlapped(device: torch.device) -> dict[str, bool]:
    """Options of a launch that may begin while the one before it ends; see `await_launches`.

    A decode step's kernels take some microseconds each, and to start one takes one more, which it
    can spend while the last programs of the one before are at work ("programmatic dependent
    launch" of GPUs from Hopper on).

    Args:
        device: Of the launch.
    """
    if _OVERLAPS.get() and can_overlap(device):
        return {"IS_OVERLAPPED": True, "launch_pdl": True}
    return {"IS_OVERLAPPED": False}


_OVERLAPS: ContextVar[bool] = ContextVar("_OVERLAPS", default=True)


@contextmanager
def launches_apart() -> Iterator[None]:
    """Inside, no launch begins before the one before it has ended: to see what each one takes."""
    before = _OVERLAPS.set(False)
    try:
        yield
    finally:
        _OVERLAPS.reset(before)


@functools.cache
def can_overlap(device: torch.device) -> bool:
    """Whether a device knows such launches, and they are wanted; Triton's interpreter does not.

    The environment variable `SPARSE_ATTENTION_OVERLAP_LAUNCHES` is 0 where they are not.

    Args:
        device: Any.
    """
    is_compiled = isinstance(await_launches, triton.JITFunction)
    is_cuda = device.type == "cuda" and is_compiled and os.environ.get(_SWITCH) != "0"
    return is_cuda and torch.cuda.get_device_capability(device) >= (9, 0)


def programs_per_row(rows: int, capacity: int, tile: int) -> int:
    """Programs that share a row's tiles; each takes every n-th of those that are in use.

    Only for kernels whose results do not depend on it.

    Args:
        rows: Of the launch.
        capacity: Of a row.
        tile: Of a row, what a program works on at once.
    """
    return max(1, min(_PROGRAMS // max(1, rows), -(-capacity // tile)))


def power_of_2(size: int) -> int:
    """The smallest power of 2 that is not less: Triton's blocks have such sizes."""
    return 1 << max(0, size - 1).bit_length()
