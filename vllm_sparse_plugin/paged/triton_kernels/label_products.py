"""Products of labels of keys (Double Sparsity) with those of a group's queries.

With less than 16 bits both sides are codes, see `channel_labels.QueryLabels`: products of four
codes are added up by one instruction, in whole numbers. (To make numbers of the codes first took
half of the time of comparing, counted from compiled code.) So scores have the errors of a handful
of float32 operations, whatever the number of channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from vllm_sparse_plugin.paged.triton_kernels.channel_labels import words_of
from vllm_sparse_plugin.paged.triton_kernels.tiles import block_bytes

_ONES = tl.constexpr(0x01010101)


@triton.jit
def _word_of(a, b, c, d):
    """Four bytes as one word, the first one lowest."""
    low = a.to(tl.int32) | (b.to(tl.int32) << 8)
    return low | (c.to(tl.int32) << 16) | (d.to(tl.int32) << 24)


@triton.jit
def _add_dot4(a, b, total, IS_INTERPRETED: tl.constexpr):
    """Adds the products of each word's four bytes, numbers from 0 to 255, to int32s."""
    if IS_INTERPRETED:
        for byte in tl.static_range(4):
            total += ((a >> (8 * byte)) & 255) * ((b >> (8 * byte)) & 255)
        return total
    else:
        return tl.inline_asm_elementwise(
            "dp4a.u32.u32 $0, $1, $2, $3;",
            "=r,r,r,r",
            [a, b, total],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )


@triton.jit
def first_label(cache, kv_head, row, OFFSET: tl.constexpr, STRIDE: tl.constexpr, ROW: tl.constexpr):
    """Pointer to a row of labels of the cache's first block.

    Args:
        cache: See the package.
        kv_head: Of the row.
        row: Of those of the KV head.
        OFFSET: Of the index.
        STRIDE: Of the index.
        ROW: Bytes of a row.
    """
    return cache.to(tl.pointer_type(tl.uint8)) + OFFSET + kv_head * STRIDE + row * ROW


@triton.jit
def multiply_labels(
    labels,
    table,
    keys,
    length,
    values,
    scales,
    KIND: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BITS: tl.constexpr,
    COUNT: tl.constexpr,
    WORDS: tl.constexpr,
    HEADS: tl.constexpr,
    IS_INTERPRETED: tl.constexpr,
):
    """Products with some keys, a `[keys]` of float32s for each head; any beyond the length.

    Scores are what they are multiplied with the first of the head's `scales`.

    Heads are separate numbers, and so keys stay in the threads that have loaded them: a product of
    two axes would move them from thread to thread.

    Args:
        labels: See `first_label`.
        table: Pointer to the sequence's row of the block table.
        keys: `[keys]`, int32, one after the other.
        length: Keys that the query sees.
        values: Pointer to the first head's, see `channel_labels.QueryLabels`.
        scales: Likewise.
        KIND: Of the cache's elements.
        BLOCK_BYTES: See `block_bytes`.
        BLOCK_SIZE: Tokens of a block.
        BITS: Of a code.
        COUNT: Kept channels.
        WORDS: See `channel_labels.words_of`.
        HEADS: Query heads.
        IS_INTERPRETED: Triton's interpreter knows no assembly.
    """
    blocks, tokens = keys // BLOCK_SIZE, keys % BLOCK_SIZE
    # Of whole blocks: a mask that differs between neighbours would make each a load of its own.
    loaded = blocks * BLOCK_SIZE < length
    block = tl.load(table + blocks, mask=loaded, other=0).to(tl.int64)
    records = labels + block * BLOCK_BYTES
    elements = records.to(tl.pointer_type(KIND)) + tokens
    sums = ()
    if BITS == 16:
        for _ in tl.static_range(HEADS):
            sums = sums + (tl.zeros_like(tokens).to(tl.float32),)  # type: ignore[assignment]  # noqa: RUF005
        # Channel by channel, as on the CPU.
        for channel in tl.range(COUNT):
            own = tl.load(elements + channel * BLOCK_SIZE, mask=loaded, other=0.0).to(tl.float32)
            added = ()
            for head in tl.static_range(HEADS):
                channel_of_head = tl.load(values + head * WORDS + channel)
                added = added + (tl.fma(own, channel_of_head, sums[head]),)  # type: ignore[assignment]  # noqa: RUF005
            sums = added
        return sums
    else:
        PARTS: tl.constexpr = 8 // BITS
        WIDTH: tl.constexpr = (COUNT + PARTS - 1) // PARTS
        QUADS: tl.constexpr = WORDS // PARTS
        START: tl.constexpr = 2 * KIND.primitive_bitwidth // 8 * BLOCK_SIZE
        low = tl.load(elements, mask=loaded, other=0.0).to(tl.float32)
        span = tl.load(elements + BLOCK_SIZE, mask=loaded, other=0.0).to(tl.float32) - low
        codes = records + START + tokens
        total = tl.zeros_like(tokens)
        for _ in tl.static_range(HEADS):
            sums = sums + (total,)  # type: ignore[assignment]  # noqa: RUF005
        for quad in tl.range(QUADS):
            at = codes + quad * 4 * BLOCK_SIZE
            a = tl.load(at, mask=loaded, other=0)
            b = tl.load(at + BLOCK_SIZE, mask=loaded & (quad * 4 + 1 < WIDTH), other=0)
            c = tl.load(at + 2 * BLOCK_SIZE, mask=loaded & (quad * 4 + 2 < WIDTH), other=0)
            d = tl.load(at + 3 * BLOCK_SIZE, mask=loaded & (quad * 4 + 3 < WIDTH), other=0)
            words = _word_of(a, b, c, d)
            for part in tl.static_range(PARTS):
                four = words
                if BITS < 8:
                    four = (words >> (part * BITS)) & (((1 << BITS) - 1) * 0x01010101)
                total = _add_dot4(four, _ONES, total, IS_INTERPRETED)
                added = ()
                for head in tl.static_range(HEADS):
                    own = tl.load(values + head * WORDS + part * QUADS + quad)
                    added = added + (_add_dot4(four, own, sums[head], IS_INTERPRETED),)  # type: ignore[assignment]  # noqa: RUF005
                sums = added
        of_codes = total.to(tl.float32)
        products = ()
        for head in tl.static_range(HEADS):
            least, constant = tl.load(scales + 3 * head + 1), tl.load(scales + 3 * head + 2)
            product = tl.fma(of_codes, least, tl.cast(sums[head], tl.float32))
            product = tl.fma(span, product, low * constant)
            products = products + (product,)  # type: ignore[assignment]  # noqa: RUF005
        return products


@dataclass(frozen=True)
class KeyLabels:
    """Where the labels of a layer's keys lie.

    Attributes:
        kv_cache: See the package; so the next one.
        place: Of the index.
        row_bytes: Of one row of labels, see `kernels.channel_labels`.
        bits: Of a code: 2, 4, 8 or 16.
        count: Kept channels.
        rows_per_head: Rows of labels per KV head: one, or one per query head.
    """

    kv_cache: torch.Tensor
    place: tuple[int, int]
    row_bytes: int
    bits: int
    count: int
    rows_per_head: int

    def constants(self) -> dict[str, Any]:
        """What kernels that multiply labels are compiled for."""
        return {
            "BLOCK_BYTES": block_bytes(self.kv_cache),
            "OFFSET": self.place[0],
            "STRIDE": self.place[1],
            "ROW_BYTES": self.row_bytes,
            "BLOCK_SIZE": self.kv_cache.shape[2],
            "BITS": self.bits,
            "COUNT": self.count,
            "LABEL_WORDS": words_of(self.count, self.bits),
        }
