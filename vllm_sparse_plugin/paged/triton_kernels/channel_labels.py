"""Labels of keys and queries (Double Sparsity); `kernels.channel_labels` has the labels' form."""

from __future__ import annotations

import torch
import triton.language as tl

from vllm_sparse_plugin.paged.triton_kernels.grids import launched
from vllm_sparse_plugin.paged.triton_kernels.quantization import (
    codes_of,
    round_to,
    smallest_and_step,
)
from vllm_sparse_plugin.paged.triton_kernels.tiles import block_bytes, padded, rows_at_once


@launched
def _write_labels(
    cache,
    channels,
    slots,
    num_tokens,
    BLOCK_BYTES: tl.constexpr,
    OFFSET: tl.constexpr,
    STRIDE: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    ROWS_PER_HEAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BITS: tl.constexpr,
    COUNT: tl.constexpr,
    PARTS: tl.constexpr,
    PART: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    row = tl.program_id(1)
    tokens = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    slot = tl.load(slots + tokens, mask=tokens < num_tokens, other=-1)[:, None, None]
    token = (slot % BLOCK_SIZE).to(tl.int32)
    head = row // ROWS_PER_HEAD
    block = cache.to(tl.pointer_type(tl.uint8)) + slot // BLOCK_SIZE * BLOCK_BYTES
    keys = block.to(cache.dtype) + (head * BLOCK_SIZE + token) * (2 * HEAD_SIZE)
    records = block + OFFSET + head * STRIDE + row % ROWS_PER_HEAD * ROW_BYTES
    # Byte j of the codes has the j-th channel of each part.
    columns = tl.arange(0, COLUMNS)[None, None, :]
    parts = tl.arange(0, PARTS)[None, :, None]
    places = parts * PART + columns
    inside = (columns < PART) & (places < COUNT)
    kept = tl.load(channels + row * COUNT + places, mask=inside, other=0)
    mask = inside & (slot >= 0)
    values = tl.load(keys + kept, mask=mask, other=0.0)
    if BITS == 16:
        tl.store(records.to(cache.dtype) + places * BLOCK_SIZE + token, values, mask=mask)
    else:
        values = values.to(tl.float32)
        low, step = smallest_and_step(values, inside, BITS)
        scales = records.to(tl.pointer_type(tl.float32)) + token
        tl.store(scales, low, mask=slot >= 0)
        tl.store(scales + BLOCK_SIZE, step, mask=slot >= 0)
        codes = tl.where(inside, codes_of(values, low, step, BITS).to(tl.int32), 0)
        packed = tl.sum(codes << (parts * BITS), axis=1)[:, None, :].to(tl.uint8)
        target = records + 8 * BLOCK_SIZE + columns * BLOCK_SIZE + token
        tl.store(target, packed, mask=(columns < PART) & (slot >= 0))


@launched
def _label_queries(
    query,
    channels,
    labels,
    query_stride,
    head_stride,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    KIND: tl.constexpr,
    COUNT: tl.constexpr,
    HEADS_TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64)
    heads = tl.arange(0, HEADS_TILE)[:, None, None]
    columns = tl.arange(0, COLUMNS)[None, None, :]
    mask = (heads < HEADS) & (columns < COUNT)
    kept = tl.load(channels + heads // GROUP * COUNT + columns, mask=mask, other=0)
    own = query + index * query_stride + heads * head_stride
    values = tl.load(own + kept, mask=mask, other=0.0).to(tl.float32)
    if BITS < 16:
        low, step = smallest_and_step(values, columns < COUNT, BITS)
        values = round_to(codes_of(values, low, step, BITS) * step + low, KIND)
    tl.store(labels + (index * HEADS + heads) * COUNT + columns, values, mask=mask)


def write_labels(
    kv_cache: torch.Tensor,
    place: tuple[int, int],
    row_bytes: int,
    bits: int,
    channels: torch.Tensor,
    head_size: int,
    slots: torch.Tensor,
) -> None:
    """Writes the labels of new keys; the codes are those of `pseudo_quantize`.

    Source: Double Sparsity, arXiv:2408.07092.

    Args:
        kv_cache: See the package, with the new keys; so `place` and `slots`.
        place: Of the index.
        row_bytes: Of one row of labels, see `kernels.channel_labels`.
        bits: Of a code: 2, 4, 8 or 16.
        channels: `[rows, C]`, int32, contiguous; a multiple of the KV heads, each head's rows side
            by side.
        head_size: Channels of a key.
        slots: Of the new keys.
    """
    if slots.shape[0] == 0:
        return
    rows, count = channels.shape
    parts = max(1, 8 // bits)
    part = -(-count // parts)
    columns = padded(part)
    tokens = rows_at_once(2 * parts, columns, most=32)
    _write_labels[(-(-slots.shape[0] // tokens), rows)](
        kv_cache,
        channels,
        slots,
        slots.shape[0],
        BLOCK_BYTES=block_bytes(kv_cache),
        OFFSET=place[0],
        STRIDE=place[1],
        ROW_BYTES=row_bytes,
        ROWS_PER_HEAD=rows // kv_cache.shape[1],
        BLOCK_SIZE=kv_cache.shape[2],
        HEAD_SIZE=head_size,
        BITS=bits,
        COUNT=count,
        PARTS=parts,
        PART=part,
        COLUMNS=columns,
        TOKENS=tokens,
        enable_fp_fusion=False,
    )


def label_queries(
    query: torch.Tensor,
    channels: torch.Tensor,
    bits: int,
    dtype: torch.dtype,
    labels: torch.Tensor,
) -> None:
    """The queries' kept channels, as `pseudo_quantize` leaves them.

    Args:
        query: `[num_queries, num_heads, head_size]`, of any float type; channels side by side.
        channels: `[rows, C]`, int32, contiguous; a divisor of the query heads.
        bits: Of a code: 2, 4, 8 or 16.
        dtype: Of the model's numbers.
        labels: `[num_queries, num_heads, C]`, float32, contiguous; written.
    """
    num_queries, num_heads, _ = query.shape
    if num_queries == 0:
        return
    rows, count = channels.shape
    _label_queries[(num_queries,)](
        query,
        channels,
        labels,
        query.stride(0),
        query.stride(1),
        HEADS=num_heads,
        GROUP=num_heads // rows,
        BITS=bits,
        KIND=_KINDS[dtype],
        COUNT=count,
        HEADS_TILE=padded(num_heads),
        COLUMNS=padded(count),
        enable_fp_fusion=False,
    )


_KINDS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
