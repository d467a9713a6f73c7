"""Scores of pages as matrix products.

A score is a product of two rows: a query's negative channels and then its positive ones, a page's
lows and then its highs. So tensor cores make the scores, those of a group's heads at once. One by
one, four heads' products and their sums would take two and a half to five times as long as loading
the bounds (counted from compiled code, for an H100: `tests.plugin.triton.instruction_counts`).

Of codes, tensor cores multiply the codes themselves; what a row of them starts from, and the step
between them, come in afterwards:

    sum_d q_d (least + step c_d) = least sum_d q_d + step sum_d q_d c_d

Codes are exact in float16; queries are too, scaled by powers of 2 (float32s: as sums of three). So
are elements of 16 bits, and queries of the same type; and elements of 8 bits in the type of the
queries. Others are multiplied as float32s, without tensor cores. Products are exact then, and only
sums are rounded: the error is at most that of float32 sums in any order, where products of codes
count as `|q_d| (|least| + step c_d)`. (Tensor cores cut off where others round to the nearest, but
only once per 8 or 16 products.) Only a channel of a query that is less than 2**-22 of its largest
one may be off, by 2**-33 of that.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def float16_factors(largest):
    """Powers of 2 that take float32s up to `largest` into float16, and products with codes back.

    Args:
        largest: `[heads]`, float32, not negative: the size of each query's largest channel.

    Returns:
        Two `[heads]`, float32: the first brings `largest` to 2**14 or more, below 2**15; the second
        undoes that and the 2**-24 of `codes_of_words`.
    """
    exponent = tl.minimum(tl.maximum(largest.to(tl.int32, bitcast=True) >> 23, 15), 240)
    factor = ((268 - exponent) << 23).to(tl.float32, bitcast=True)
    return factor, ((exponent + 10) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _queries_of_bounds(
    query,
    head_stride,
    factor,
    first,
    PART: tl.constexpr,
    STEP: tl.constexpr,
    UNITS: tl.constexpr,
    SIDES: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """What a group's queries give to some bounds of a record, `[UNITS, HEADS * SIDES]`, float32.

    A row of lows and a row of highs lie in a record side by side: to the lows queries give their
    negative channels, and to the highs their positive ones.

    Args:
        query: Pointer to the first query's channel that is the first of the part.
        head_stride: From one query head's to the next one's.
        factor: `[HEADS]`, float32: of each query.
        first: Of the bounds, counted from the first low of the part on.
        PART: Channels of the part.
        STEP: From one bound to the next.
        UNITS: Bounds; those behind the last high get zeros.
        SIDES: 1: a column of the result per head. 2: one that gives nothing to the highs, and next
            to it, one that gives nothing to the lows.
        HEADS: `GROUP` as an axis.
        GROUP: Query heads.
    """
    head = tl.arange(0, HEADS)[:, None, None]
    side = tl.arange(0, SIDES)[None, :, None]
    bounds = first + STEP * tl.arange(0, UNITS)[None, None, :]
    is_high = bounds >= PART
    there = (head < GROUP) & (bounds < 2 * PART)
    if SIDES == 2:
        there = there & (is_high == (side == 1))
    own = tl.load(query + head * head_stride + bounds % PART, mask=there, other=0.0)
    own = own.to(tl.float32) * factor[:, None, None]
    own = tl.where(is_high, tl.maximum(own, 0.0), tl.minimum(own, 0.0))
    return tl.trans(tl.reshape(own, [HEADS * SIDES, UNITS]))


@triton.jit
def operands_of(
    query,
    head_stride,
    factor,
    KIND: tl.constexpr,
    BITS: tl.constexpr,
    PART: tl.constexpr,
    UNITS: tl.constexpr,
    SIDES: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PIECES: tl.constexpr,
):
    """A group's queries as what bounds are multiplied with, each `[UNITS, HEADS * SIDES]`.

    Args:
        query: Pointer to the group's first query.
        head_stride: From one query head's to the next one's.
        factor: `[HEADS]`, float32: of each query.
        KIND: Of the results.
        BITS: Of a code. Those of less than 16 are loaded in words of 2 bytes: there is a result for
            each of their places in it, divided by what a code there is multiplied with.
        PART: See `parts_of`.
        UNITS: Words, or elements of 16 bits.
        SIDES: See `_queries_of_bounds`.
        HEADS: Likewise.
        GROUP: Likewise.
        PIECES: Numbers whose sum stands for one.

    Returns:
        A tuple of places' tuples of pieces, one after the other.
    """
    operands = ()
    for place in tl.static_range(16 // BITS):
        own = _queries_of_bounds(
            query + place // 2 * PART,
            head_stride,
            factor * (1.0 / (1 << (place // 2 * BITS))),
            place % 2,
            PART,
            1 if BITS == 16 else 2,
            UNITS,
            SIDES,
            HEADS,
            GROUP,
        )
        for _ in tl.static_range(PIECES):
            piece = own.to(KIND)
            operands = operands + (piece,)  # type: ignore[assignment]  # noqa: RUF005
            own -= piece.to(tl.float32)
    return operands


@triton.jit
def codes_of_words(
    words, BYTE: tl.constexpr, SHIFT: tl.constexpr, BITS: tl.constexpr, IN_PAIRS: tl.constexpr
):
    """The codes in some bits of words, times `2**(SHIFT - 24)`, float16.

    Without any arithmetic: a float16 of no exponent's bits is its other bits times 2**-24, and
    tensor cores multiply such numbers like others (Fasi, Higham, Mikaitis and Pranesh 2021,
    "Numerical behavior of NVIDIA tensor cores").

    Args:
        words: uint16.
        BYTE: Of the word: 0 or 1.
        SHIFT: The code's first bit in it.
        BITS: Of a code.
        IN_PAIRS: Whether to mask two words at once, in the register of 32 bits that holds both, as
            Triton does not by itself. Its interpreter knows no assembly.
    """
    if IN_PAIRS:
        return tl.inline_asm_elementwise(
            f"{{ .reg .b32 t; shr.u32 t, $1, {8 * BYTE}; "
            f"and.b32 $0, t, {(((1 << BITS) - 1) << SHIFT) * 0x10001}; }}",
            "=r,r",
            [words],
            dtype=tl.float16,
            is_pure=True,
            pack=2,
        )
    else:
        # Of bytes, masked before they are widened: that compiles to half as many instructions.
        codes = (words >> (8 * BYTE)).to(tl.uint8) & (((1 << BITS) - 1) << SHIFT)
        return codes.to(tl.uint16).to(tl.float16, bitcast=True)


@triton.jit
def add_products(queries, bounds, sums, IN_FLOAT32: tl.constexpr):
    """Adds matrix products `[pages, columns]` of bounds and queries to float32 sums."""
    if IN_FLOAT32:
        return tl.dot(bounds.to(tl.float32), queries, sums, input_precision="ieee")
    else:  # (bounds of 8 bits are numbers of the queries' type too)
        return tl.dot(bounds.to(queries.dtype), queries, sums)


@triton.jit
def starts_of_pages(
    blocks,
    tile,
    whole,
    BLOCK_BYTES: tl.constexpr,
    RECORD_BYTES: tl.constexpr,
    PER_BLOCK: tl.constexpr,
    PAGES: tl.constexpr,
):
    """Where a tile's records are from the first block's first one on, `[PAGES]`, int64, in bytes.

    Args:
        blocks: Pointer to the sequence's row of the block table.
        tile: Of pages.
        whole: Pages that all keys are seen of; the last one takes the places of those missing.
        BLOCK_BYTES: See `block_bytes`.
        RECORD_BYTES: Of a record.
        PER_BLOCK: Pages of a block.
        PAGES: Of a tile.
    """
    pages = tl.minimum(tile * PAGES + tl.arange(0, PAGES), tl.maximum(whole - 1, 0))
    block = tl.load(blocks + pages // PER_BLOCK).to(tl.int64)
    return block * BLOCK_BYTES + pages % PER_BLOCK * RECORD_BYTES


@triton.jit
def scales_of_pages(records, PAGES: tl.constexpr):
    """The smallest values and the steps of pages' two rows of codes, two `[pages, 2]`, float32."""
    places = records.to(tl.pointer_type(tl.float32))[:, None] + tl.arange(0, 4)[None, :]
    # One load of 16 bytes for each page: there are few others in its lines of the cache.
    scales = tl.reshape(tl.load(places), [PAGES, 2, 2])
    return tl.split(scales)
