"""Labels of keys and queries (Double Sparsity); `kernels.channel_labels` has the labels' form."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton.language as tl

from vllm_sparse_plugin.paged.triton_kernels.grids import await_launches, launched, overlapped
from vllm_sparse_plugin.paged.triton_kernels.quantization import (
    codes_of,
    extremes_of,
    smallest_and_step,
    step_between,
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
    IS_OVERLAPPED: tl.constexpr,
):
    await_launches(IS_OVERLAPPED)
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
        low, high = extremes_of(values, inside)
        extremes = records.to(cache.dtype) + token
        tl.store(extremes, low.to(cache.dtype.element_ty), mask=slot >= 0)
        tl.store(extremes + BLOCK_SIZE, high.to(cache.dtype.element_ty), mask=slot >= 0)
        step = step_between(low, high, BITS)
        codes = tl.where(inside, codes_of(values, low, step, BITS).to(tl.int32), 0)
        packed = tl.sum(codes << (parts * BITS), axis=1)[:, None, :].to(tl.uint8)
        start: tl.constexpr = 2 * cache.dtype.element_ty.primitive_bitwidth // 8 * BLOCK_SIZE
        target = records + start + columns * BLOCK_SIZE + token
        tl.store(target, packed, mask=(columns < PART) & (slot >= 0))


@launched
def _label_queries(
    query,
    channels,
    values,
    scales,
    scale,
    query_stride,
    head_stride,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    COUNT: tl.constexpr,
    PARTS: tl.constexpr,
    PART: tl.constexpr,
    WORDS: tl.constexpr,
    HEADS_TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
    IS_OVERLAPPED: tl.constexpr,
):
    await_launches(IS_OVERLAPPED)
    index = tl.program_id(0).to(tl.int64)
    heads = tl.arange(0, HEADS_TILE)[:, None, None]
    columns = tl.arange(0, COLUMNS)[None, None, :]
    parts = tl.arange(0, PARTS)[None, :, None]
    places = parts * PART + columns
    inside = (columns < PART) & (places < COUNT)
    mask = (heads < HEADS) & inside
    kept = tl.load(channels + heads // GROUP * COUNT + places, mask=mask, other=0)
    own = query + index * query_stride + heads * head_stride
    found = tl.load(own + kept, mask=mask, other=0.0).to(tl.float32)
    row = index * HEADS + heads
    scales += 3 * row
    if BITS == 16:
        tl.store(values + row * WORDS + places, found, mask=mask)
        tl.store(scales, tl.zeros_like(row).to(tl.float32) + scale, mask=heads < HEADS)
    else:
        low, step = smallest_and_step(found, inside, BITS)
        codes = tl.where(inside, codes_of(found, low, step, BITS).to(tl.int32), 0)
        packed = tl.reshape(codes, [HEADS_TILE, PARTS, COLUMNS // 4, 4])
        packed = packed << (8 * tl.arange(0, 4))[None, None, None, :]
        words = parts * (WORDS // PARTS) + tl.arange(0, COLUMNS // 4)[None, None, :]
        present = (heads < HEADS) & (words < (parts + 1) * (WORDS // PARTS))
        tl.store(values + row * WORDS + words, tl.sum(packed, axis=3), mask=present)
        total = tl.sum(tl.sum(codes, axis=2), axis=1)[:, None, None].to(tl.float32)
        levels: tl.constexpr = (1 << BITS) - 1
        least = low / step
        tl.store(scales, step * (scale / levels), mask=heads < HEADS)
        tl.store(scales + 1, least, mask=heads < HEADS)
        tl.store(scales + 2, levels * (total + COUNT * least), mask=heads < HEADS)


@dataclass(frozen=True)
class QueryLabels:
    """Some queries' kept channels, as `label_products` multiplies them with labels.

    A query's channel is `step (r + o)`, and a key's `least + span / levels c`, where `o` and `c`
    are codes, `levels` is the largest one, and `r` what the query's smallest value is of its step:

        sum q k = step / levels (span (sum o c + r sum c) + least levels (sum o + C r))

    Attributes:
        values: `[num_queries, num_heads, words]`: with 16 bits, float32s, the channels. With less,
            int32s of four codes each: of the channels whose codes in a key's label lie in the same
            bits of four bytes, one behind the other.
        scales: `[num_queries, num_heads, 3]`, float32: what scores are multiplied with at last; and
            with less than 16 bits `r` and `levels (sum o + C r)`.
    """

    values: torch.Tensor
    scales: torch.Tensor

    @classmethod
    def of(
        cls, num_queries: int, num_heads: int, count: int, bits: int, device: torch.device | str
    ) -> QueryLabels:
        """Asks for the memory.

        Args:
            num_queries: Of a launch.
            num_heads: Query heads.
            count: Kept channels.
            bits: Of a code: 2, 4, 8 or 16.
            device: Of the kernels.
        """
        rows, dtype = (num_queries, num_heads), torch.float32 if bits == 16 else torch.int32
        values = torch.zeros(*rows, words_of(count, bits), dtype=dtype, device=device)
        return cls(values, torch.zeros(*rows, 3, dtype=torch.float32, device=device))

    def first(self, num_queries: int) -> QueryLabels:
        """Of so many queries."""
        return QueryLabels(self.values[:num_queries], self.scales[:num_queries])


def words_of(count: int, bits: int) -> int:
    """Numbers of a query's label.

    Args:
        count: Kept channels.
        bits: Of a code.
    """
    parts = max(1, 8 // bits)
    return count if bits == 16 else parts * -(-count // (4 * parts))


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
        **overlapped(kv_cache.device),
    )


def label_queries(
    query: torch.Tensor,
    channels: torch.Tensor,
    bits: int,
    scale: float,
    labels: QueryLabels,
) -> None:
    """The queries' kept channels; their codes are those of `pseudo_quantize`.

    Args:
        query: `[num_queries, num_heads, head_size]`, of any float type; channels side by side.
        channels: `[rows, C]`, int32, contiguous; a divisor of the query heads.
        bits: Of a code: 2, 4, 8 or 16.
        scale: Of the products.
        labels: For as many queries; written.
    """
    num_queries, num_heads, _ = query.shape
    if num_queries == 0:
        return
    rows, count = channels.shape
    parts = max(1, 8 // bits)
    part = -(-count // parts)
    _label_queries[(num_queries,)](
        query,
        channels,
        labels.values,
        labels.scales,
        float(scale),
        query.stride(0),
        query.stride(1),
        HEADS=num_heads,
        GROUP=num_heads // rows,
        BITS=bits,
        COUNT=count,
        PARTS=parts,
        PART=part,
        WORDS=words_of(count, bits),
        HEADS_TILE=padded(num_heads),
        COLUMNS=max(4, padded(part)),
        enable_fp_fusion=False,
        **overlapped(query.device),
    )
