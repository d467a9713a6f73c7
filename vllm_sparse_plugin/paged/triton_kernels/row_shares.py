"""What pages are ranked by, for a program that has all of a row: see `row_selection`."""

import triton
import triton.language as tl

from vllm_sparse_plugin.paged.triton_kernels.pooling import load_scores, load_shares
from vllm_sparse_plugin.paged.triton_kernels.radix import load_numbers


@triton.jit
def shifts_of_row(
    scores,
    row_stride,
    pages,
    scale,
    HEADS: tl.constexpr,
    AT_ONCE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """What exponents (base 2) are less by, so that powers of all heads add up to a mean of shares.

    The rule of `pooling.shifts_of`, by a program that has the row to itself.

    Args:
        scores: Pointer to those of the group's first head.
        row_stride: From one head's to the next one's.
        pages: Of the row.
        scale: Of the scores, to exponents of 2.
        HEADS: Of the group.
        AT_ONCE: Of them.
        CHUNK: Pages at once.

    Returns:
        A tuple of `[AT_ONCE]`, float32, for so many heads after the others.
    """
    shifts = ()
    for head in tl.static_range(0, HEADS, AT_ONCE):
        own = scores + head * row_stride
        highest = tl.full([AT_ONCE, CHUNK], float("-inf"), tl.float32)
        for chunk in range(0, pages, CHUNK):
            found = load_scores(own, row_stride, chunk, pages, HEADS - head, AT_ONCE, CHUNK)
            highest = tl.maximum(highest, found)
        peak = tl.max(highest, 1) * scale
        peak = tl.where(peak == float("-inf"), 0.0, peak)
        powers = tl.zeros([AT_ONCE, CHUNK], tl.float32)
        for chunk in range(0, pages, CHUNK):
            found = load_scores(own, row_stride, chunk, pages, HEADS - head, AT_ONCE, CHUNK)
            powers += tl.exp2(tl.fma(found, scale, -peak[:, None]))
        mass = tl.sum(powers, 1)
        whole = tl.where(mass > 0, mass, 1.0) * HEADS
        shift = tl.where(mass > 0, peak + tl.log2(whole), float("inf"))
        shifts = shifts + (shift,)  # type: ignore[assignment]  # noqa: RUF005
    return shifts


@triton.jit
def values_of_chunk(
    scores,
    row_stride,
    shifts,
    scale,
    chunk,
    pages,
    HEADS: tl.constexpr,
    AT_ONCE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """What pages are ranked by, `[CHUNK]`, float32: a head's scores, or a group's mean of shares.

    Args:
        scores: See `shifts_of_row`; so all but the next and `chunk`.
        row_stride: As there.
        shifts: What it gives.
        scale: As there.
        chunk: The first page.
        pages: As there.
        HEADS: As there.
        AT_ONCE: As there.
        CHUNK: As there.
    """
    if HEADS == 1:
        found, _ = load_numbers(scores.to(tl.pointer_type(tl.int32)), chunk, pages, CHUNK)
        values = found.to(tl.float32, bitcast=True)
    else:
        values = tl.zeros([CHUNK], tl.float32)
        for head in tl.static_range(0, HEADS, AT_ONCE):
            values += load_shares(
                scores + head * row_stride,
                row_stride,
                shifts[head // AT_ONCE],
                scale,
                chunk,
                pages,
                HEADS - head,
                AT_ONCE,
                CHUNK,
            )
    return values
