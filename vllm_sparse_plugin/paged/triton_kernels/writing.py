"""Writing new keys and values into their blocks."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_sparse_plugin.paged.cache_scales import UNSCALED, CacheScales
from vllm_sparse_plugin.paged.triton_kernels.grids import await_launches, launched, overlapped
from vllm_sparse_plugin.paged.triton_kernels.tiles import block_bytes, padded, rows_at_once


@triton.jit
def stored_as(rows, scale, KIND: tl.constexpr):
    """See `layout.stored_as`.

    Args:
        rows: Of any shape.
        scale: What they are divided by, where the cache has 8 bits.
        KIND: Of the cache's elements.
    """
    if KIND.is_fp8():
        numbers = rows.to(tl.float32)
        numbers = tl.div_rn(numbers, tl.zeros_like(numbers) + scale)
        numbers = tl.clamp(numbers, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
        # Rounded here, ties to even, whatever Triton's own conversion does (that of its interpreter
        # loses carries): from 2**(e + 20) on, float32s have the steps of E4M3s between 2**e and
        # 2**(e + 1).
        exponent = numbers.to(tl.int32, bitcast=True) & 0x7F800000
        ruler = (tl.maximum(exponent, 121 << 23) + (20 << 23)).to(tl.float32, bitcast=True)
        size = (tl.abs(numbers) + ruler) - ruler
        sign = numbers.to(tl.uint32, bitcast=True) & 0x80000000
        bits = size.to(tl.uint32, bitcast=True) | sign
        return bits.to(tl.float32, bitcast=True).to(KIND)
    else:
        return rows


@launched
def _write_rows(
    key,
    value,
    cache,
    slots,
    count,
    key_stride,
    key_head_stride,
    value_stride,
    value_head_stride,
    key_scale,
    value_scale,
    BLOCK_ELEMENTS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEADS_TILE: tl.constexpr,
    CHANNELS: tl.constexpr,
    TOKENS: tl.constexpr,
    IS_OVERLAPPED: tl.constexpr,
):
    await_launches(IS_OVERLAPPED)
    tokens = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    slot = tl.load(slots + tokens, mask=tokens < count, other=-1)
    heads = tl.arange(0, HEADS_TILE)[None, :, None]
    channels = tl.arange(0, CHANNELS)[None, None, :]
    mask = (slot >= 0)[:, None, None] & (heads < HEADS) & (channels < HEAD_SIZE)
    tokens, slot = tokens[:, None, None], slot[:, None, None]
    keys = tl.load(key + tokens * key_stride + heads * key_head_stride + channels, mask=mask)
    values = tl.load(
        value + tokens * value_stride + heads * value_head_stride + channels, mask=mask
    )
    row = heads * BLOCK_SIZE + slot % BLOCK_SIZE
    target = cache + slot // BLOCK_SIZE * BLOCK_ELEMENTS + row * (2 * HEAD_SIZE) + channels
    tl.store(target, stored_as(keys, key_scale, cache.dtype.element_ty), mask=mask)
    values = stored_as(values, value_scale, cache.dtype.element_ty)
    tl.store(target + HEAD_SIZE, values, mask=mask)


def write_rows(
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    slots: torch.Tensor,
    scales: CacheScales = UNSCALED,
) -> None:
    """Writes a row of key and a row of value per token and KV head.

    Args:
        key: `[num_tokens, num_kv_heads, head_size]`, of the cache's type, unless that has 8 bits;
            channels side by side.
        value: Likewise.
        kv_cache: See the package.
        slots: `[>= num_tokens]`, int64; see the package.
        scales: Of the cache.

    Raises:
        ValueError: The types differ, or channels are not side by side.
    """
    check_rows(key, value, kv_cache)
    num_tokens, heads, head_size = key.shape
    count = min(num_tokens, slots.shape[0])
    if count == 0:
        return
    channels = padded(head_size)
    at_once = rows_at_once(2 * padded(heads), channels, most=16)
    _write_rows[(-(-count // at_once),)](
        key,
        value,
        kv_cache,
        slots,
        count,
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        float(scales.key),
        float(scales.value),
        BLOCK_ELEMENTS=block_bytes(kv_cache) // kv_cache.itemsize,
        BLOCK_SIZE=kv_cache.shape[2],
        HEADS=heads,
        HEAD_SIZE=head_size,
        HEADS_TILE=padded(heads),
        CHANNELS=channels,
        TOKENS=at_once,
        enable_fp_fusion=False,
        **overlapped(kv_cache.device),
    )


def check_rows(key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor) -> None:
    """Looks whether rows can be written as they are.

    Args:
        key: See `write_rows`; so the others.
        value: Likewise.
        kv_cache: Likewise.

    Raises:
        ValueError: The types differ, or channels are not side by side.
    """
    stored = key.dtype if kv_cache.itemsize == 1 else kv_cache.dtype
    if not key.dtype == value.dtype == stored:
        raise ValueError(
            f"keys of {key.dtype} and values of {value.dtype} for a cache of {kv_cache.dtype}"
        )
    if key.stride(2) != 1 or value.stride(2) != 1:
        raise ValueError("the channels of keys and values must be side by side")
