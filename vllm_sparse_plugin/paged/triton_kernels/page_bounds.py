"""Bounds of pages (Quest), written with the keys; `kernels.page_bounds` has the records' form."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_sparse_plugin.paged.cache_scales import UNSCALED, CacheScales
from vllm_sparse_plugin.paged.triton_kernels.grids import await_launches, launched, overlapped
from vllm_sparse_plugin.paged.triton_kernels.quantization import codes_of, smallest_and_step
from vllm_sparse_plugin.paged.triton_kernels.tiles import block_bytes, padded
from vllm_sparse_plugin.paged.triton_kernels.writing import check_rows, stored_as

KEYS_AT_ONCE = 16
"""Keys of a page that are loaded together."""
_WARPS = 2
"""Of a program that writes one key and its page's bounds: few wait for each other sooner."""


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
    # Both rows at once: each of the sums below is a wait of all threads for each other.
    rows = tl.permute(tl.join(low, high), (2, 0, 1))
    sides, columns = tl.arange(0, 2), tl.arange(0, low.shape[1])
    shifts = (tl.arange(0, PARTS) * BITS)[None, :, None]
    least, step = smallest_and_step(rows, (columns < PART)[None, None, :], BITS)
    scales = record.to(tl.pointer_type(tl.float32)) + 2 * sides[:, None, None]
    tl.store(scales, least)
    tl.store(scales + 1, step)
    codes = codes_of(rows, least, step, BITS).to(tl.int32) << shifts
    packed = tl.sum(codes, axis=1).to(tl.uint8)
    target = record + 16 + sides[:, None] * PART + columns[None, :]
    tl.store(target, packed, mask=(columns < PART)[None, :])


@triton.jit
def _bounds_of_new_page(
    elements,
    slots,
    i,
    slot,
    key,
    key_stride,
    key_scale,
    PAGE_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    PARTS: tl.constexpr,
    PART: tl.constexpr,
    KEYS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """As `bounds_of_keys`, where keys of this launch are taken from the model's own tensor.

    Other programs write them into the cache meanwhile.

    Args:
        elements: Pointer to the page's first key in the cache.
        slots: Of the launch.
        i: The last key's place among them.
        slot: The last key's.
        key: Pointer to the head's first new key.
        key_stride: From one new key to the next.
        key_scale: Of the cache.
        PAGE_SIZE: Keys of the page.
        HEAD_SIZE: See `bounds_of_keys`.
        PARTS: Likewise.
        PART: Likewise.
        KEYS: Likewise.
        COLUMNS: Likewise.
    """
    keys = tl.arange(0, KEYS)[:, None, None]
    columns = tl.arange(0, COLUMNS)[None, None, :]
    channels = tl.arange(0, PARTS)[None, :, None] * PART + columns
    inside = columns < PART
    low = tl.full([PARTS, COLUMNS], float("inf"), tl.float32)
    high = tl.full([PARTS, COLUMNS], float("-inf"), tl.float32)
    for first in tl.static_range(0, PAGE_SIZE, KEYS):
        rows = tl.minimum(first + keys, PAGE_SIZE - 1)
        back = PAGE_SIZE - 1 - rows
        own = tl.load(slots + i - back, mask=back <= i, other=-1)
        # Both from everywhere, while it is not known which are needed: what other programs write
        # meanwhile is new, and not taken from the cache.
        at = key + (i - back).to(tl.int64) * key_stride + channels
        new = tl.load(at, mask=inside & (back <= i), other=0.0)
        old = tl.load(elements + rows * (2 * HEAD_SIZE) + channels, mask=inside, other=0.0)
        is_new = own == slot - back
        new = stored_as(new, key_scale, elements.dtype.element_ty).to(tl.float32)
        values = tl.where(is_new, new, old.to(tl.float32))
        low = tl.minimum(low, tl.min(values, axis=0))
        high = tl.maximum(high, tl.max(values, axis=0))
    return low, high


@launched
def _update_pages(
    cache,
    slots,
    key,
    value,
    key_stride,
    key_head_stride,
    value_stride,
    value_head_stride,
    key_scale,
    value_scale,
    WRITES: tl.constexpr,
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
    CHANNELS: tl.constexpr,
    IS_OVERLAPPED: tl.constexpr,
):
    await_launches(IS_OVERLAPPED)
    i, head = tl.program_id(0), tl.program_id(1)
    slot = tl.load(slots + i)
    token = (slot % BLOCK_SIZE).to(tl.int32)
    block = cache.to(tl.pointer_type(tl.uint8)) + slot // BLOCK_SIZE * BLOCK_BYTES
    rows = block.to(cache.dtype) + head * (BLOCK_SIZE * 2 * HEAD_SIZE)
    if WRITES:
        channels = tl.arange(0, CHANNELS)
        mask = channels < tl.where(slot >= 0, HEAD_SIZE, 0)
        own = i.to(tl.int64)
        new_key = tl.load(key + own * key_stride + head * key_head_stride + channels, mask=mask)
        new_key = stored_as(new_key, key_scale, cache.dtype.element_ty)
        tl.store(rows + token * (2 * HEAD_SIZE) + channels, new_key, mask=mask)
        at = value + own * value_stride + head * value_head_stride + channels
        new_value = stored_as(tl.load(at, mask=mask), value_scale, cache.dtype.element_ty)
        tl.store(rows + token * (2 * HEAD_SIZE) + HEAD_SIZE + channels, new_value, mask=mask)
    # A page's last key does it for the page; before that, nobody reads its record.
    if (slot >= 0) & ((slot + 1) % PAGE_SIZE == 0):
        keys = rows + (token + 1 - PAGE_SIZE) * (2 * HEAD_SIZE)
        if WRITES:
            low, high = _bounds_of_new_page(
                keys,
                slots,
                i,
                slot,
                key + head * key_head_stride,
                key_stride,
                key_scale,
                PAGE_SIZE,
                HEAD_SIZE,
                PARTS,
                PART,
                KEYS,
                COLUMNS,
            )
        else:
            low, high = bounds_of_keys(keys, PAGE_SIZE, HEAD_SIZE, PARTS, PART, KEYS, COLUMNS)
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
    key: torch.Tensor | None = None,
    value: torch.Tensor | None = None,
    scales: CacheScales = UNSCALED,
) -> None:
    """Writes the records of the pages that are whole now: whose last key is among those written.

    Args:
        kv_cache: See the package, with the new keys, unless they come with the call; so `place`.
        place: Of the index.
        record_bytes: Of a page's record.
        head_size: Channels of a key.
        page_size: Tokens of a page, a divisor of the block size.
        bits: Of a code: 2, 4, 8 or 16.
        slots: Of the written tokens, those of one sequence in order; see the package.
        key: `[>= num_slots, num_kv_heads, head_size]`, of the cache's type, or any if that has 8
            bits, channels side by side: new keys, to be written too, in the same launch. None: they
            have been written.
        value: Likewise.
        scales: Of the cache.

    Raises:
        ValueError: The types differ, or channels are not side by side.
    """
    if slots.shape[0] == 0:
        return
    rows = (kv_cache, kv_cache) if key is None or value is None else (key, value)
    writes = key is not None
    if writes:
        check_rows(*rows, kv_cache)
    parts, part = parts_of(head_size, bits)
    _update_pages[(slots.shape[0], kv_cache.shape[1])](
        kv_cache,
        slots,
        *rows,
        *(stride for row in rows for stride in row.stride()[:2]),
        float(scales.key),
        float(scales.value),
        WRITES=writes,
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
        CHANNELS=padded(head_size),
        enable_fp_fusion=False,
        num_warps=_WARPS,
        **overlapped(kv_cache.device),
    )
