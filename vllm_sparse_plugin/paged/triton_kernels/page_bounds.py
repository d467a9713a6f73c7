"""Bounds of pages (Quest), written with the keys; `kernels.page_bounds` has the records' form."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_sparse_plugin.paged.triton_kernels.grids import launched
from vllm_sparse_plugin.paged.triton_kernels.quantization import codes_of, smallest_and_step
from vllm_sparse_plugin.paged.triton_kernels.tiles import block_bytes, padded

KEYS_AT_ONCE = 16
"""Keys of a page that are loaded together."""


def parts_of(head_size: int, bits: int) -> tuple[int, int]:
    """Into how many parts codes divide the channels, and the channels of a part.

    Codes of less than a byte share one: byte j has the j-th channel of each part.
    """
    parts = max(1, 8 // bits)
    return parts, head_size // parts


@triton.jit
def bounds_of_keys(
    elements,
    count,
    HEAD_SIZE: tl.constexpr,
    PARTS: tl.constexpr,
    PART: tl.constexpr,
    KEYS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Smallest and largest elements of some keys in neighbouring rows.

    Args:
        elements: Pointer to the first key.
        count: Keys, at least 1.
        HEAD_SIZE: Channels of a key.
        PARTS: See `parts_of`.
        PART: See `parts_of`.
        KEYS: That are loaded at once, a power of 2.
        COLUMNS: `PART` as an axis.

    Returns:
        Two `[PARTS, COLUMNS]`, float32; zeros fill them up.
    """
    keys = tl.arange(0, KEYS)[:, None, None]
    columns = tl.arange(0, COLUMNS)[None, None, :]
    channels = tl.arange(0, PARTS)[None, :, None] * PART + columns
    low = tl.full([PARTS, COLUMNS], float("inf"), tl.float32)
    high = tl.full([PARTS, COLUMNS], float("-inf"), tl.float32)
    for first in tl.range(0, count, KEYS):
        # The last key takes the places of those that are missing.
        rows = tl.minimum(first + keys, count - 1)
        at = elements + rows * (2 * HEAD_SIZE) + channels
        values = tl.load(at, mask=columns < PART, other=0.0)
        values = values.to(tl.float32)
        low = tl.minimum(low, tl.min(values, axis=0))
        high = tl.maximum(high, tl.max(values, axis=0))
    return low, high


@triton.jit
def _store_codes(record, low, high, BITS: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr):
    columns = tl.arange(0, low.shape[1])
    shifts = (tl.arange(0, PARTS) * BITS)[None, :, None]
    inside = (columns < PART)[None, None, :]
    scales = record.to(tl.pointer_type(tl.float32)) + tl.zeros([1, 1, 1], tl.int32)
    for side in tl.static_range(2):
        row = (low if side == 0 else high)[None, :, :]
        least, step = smallest_and_step(row, inside, BITS)
        tl.store(scales + 2 * side, least)
        tl.store(scales + (2 * side + 1), step)
        codes = codes_of(row, least, step, BITS).to(tl.int32) << shifts
        packed = tl.sum(codes, axis=1).to(tl.uint8)
        target = record + 16 + side * PART + columns[None, :]
        tl.store(target, packed, mask=(columns < PART)[None, :])


@launched
def _update_pages(
    cache,
    slots,
    BLOCK_BYTES: tl.constexpr,
    OFFSET: tl.constexpr,
    STRIDE: tl.constexpr,
    RECORD_BYTES: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BITS: tl.constexpr,
    PARTS: tl.constexpr,
    PART: tl.constexpr,
    KEYS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    i, head = tl.program_id(0), tl.program_id(1)
    slot = tl.load(slots + i)
    following = tl.load(slots + i + 1, mask=i + 1 < tl.num_programs(0), other=-1)
    # The last token of a page that is written here does it for the page.
    is_last = (following != slot + 1) | ((slot + 1) % PAGE_SIZE == 0)
    if (slot >= 0) & is_last:
        token = (slot % BLOCK_SIZE).to(tl.int32)
        first = token // PAGE_SIZE * PAGE_SIZE
        block = cache.to(tl.pointer_type(tl.uint8)) + slot // BLOCK_SIZE * BLOCK_BYTES
        keys = block.to(cache.dtype) + (head * BLOCK_SIZE + first) * (2 * HEAD_SIZE)
        low, high = bounds_of_keys(keys, token + 1 - first, HEAD_SIZE, PARTS, PART, KEYS, COLUMNS)
        record = block + OFFSET + head * STRIDE + token // PAGE_SIZE * RECORD_BYTES
        if BITS == 16:
            target = record.to(cache.dtype)
            columns = tl.arange(0, COLUMNS)[None, :]
            inside = columns < HEAD_SIZE
            tl.store(target + columns, low.to(cache.dtype.element_ty), mask=inside)
            tl.store(target + HEAD_SIZE + columns, high.to(cache.dtype.element_ty), mask=inside)
        else:
            _store_codes(record, low, high, BITS, PARTS, PART)


def update_pages(
    kv_cache: torch.Tensor,
    place: tuple[int, int],
    record_bytes: int,
    head_size: int,
    page_size: int,
    bits: int,
    slots: torch.Tensor,
) -> None:
    """Makes the records of all pages that were written to right again, partial ones too.

    Args:
        kv_cache: See the package, with the new keys; so `place`.
        place: Of the index.
        record_bytes: Of a page's record.
        head_size: Channels of a key.
        page_size: Tokens of a page, a divisor of the block size.
        bits: Of a code: 2, 4, 8 or 16.
        slots: Of the written tokens, those of one sequence in order; see the package.
    """
    if slots.shape[0] == 0:
        return
    parts, part = parts_of(head_size, bits)
    _update_pages[(slots.shape[0], kv_cache.shape[1])](
        kv_cache,
        slots,
        BLOCK_BYTES=block_bytes(kv_cache),
        OFFSET=place[0],
        STRIDE=place[1],
        RECORD_BYTES=record_bytes,
        BLOCK_SIZE=kv_cache.shape[2],
        PAGE_SIZE=page_size,
        HEAD_SIZE=head_size,
        BITS=bits,
        PARTS=parts,
        PART=part,
        KEYS=min(KEYS_AT_ONCE, padded(page_size)),
        COLUMNS=padded(part),
        enable_fp_fusion=False,
    )
