"""Headers of blocks whose codes are made with something learned; see `learned_index`.

A header has, int64, how many of its block's tokens have codes, and the tag of the learned state
that they are of. On CPUs a tag names the writes that the state was learned from, by stamps in the
headers; here it is a digest of the keys themselves, and the stamps are not used. Either way equal
tags are equal keys, and nothing else is asked of a tag.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_sparse_plugin.paged.triton_kernels.cache_rows import DeviceBatch
from vllm_sparse_plugin.paged.triton_kernels.counter_random import mixed
from vllm_sparse_plugin.paged.triton_kernels.grids import launched
from vllm_sparse_plugin.paged.triton_kernels.tiles import block_bytes, padded, rows_at_once

_BITS = {4: tl.int32, 2: tl.int16, 1: tl.int8}
"""Integers of as many bytes as a number of the cache."""


@triton.jit
def header_of(
    cache, block, head, BLOCK_BYTES: tl.constexpr, OFFSET: tl.constexpr, STRIDE: tl.constexpr
):
    """The headers of some blocks, as pointers to int64.

    Args:
        cache: Pointer.
        block: Of the cache, int64.
        head: KV head.
        BLOCK_BYTES: Of a block.
        OFFSET: Of the index in a block, bytes.
        STRIDE: From one KV head's index to the next one's, bytes.
    """
    record = cache.to(tl.pointer_type(tl.uint8)) + block * BLOCK_BYTES + OFFSET + head * STRIDE
    return record.to(tl.pointer_type(tl.int64))


@triton.jit
def coded_tokens(header, tag, mask):
    """How many leading tokens of blocks have codes of the state with this tag, int32.

    Args:
        header: See `header_of`.
        tag: Of the state.
        mask: Which of the headers there are: others have none.
    """
    count = tl.load(header, mask=mask, other=0)
    found = tl.load(header + 1, mask=mask, other=0)
    return tl.where(found == tag, count, 0).to(tl.int32)


@triton.jit
def span_without_codes(
    cache,
    blocks,
    tile,
    length,
    tag,
    kv_head,
    BLOCK_BYTES: tl.constexpr,
    OFFSET: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """The first of a tile's blocks that lack codes, and the one after the last: [0, 0) if none do.

    Args:
        cache: Pointer.
        blocks: Pointer to the sequence's row of the block table.
        tile: Which one.
        length: Keys that need codes.
        tag: Of the state.
        kv_head: Whose.
        BLOCK_BYTES: See `header_of`; so the next two.
        OFFSET: Likewise.
        STRIDE: Likewise.
        BLOCK_SIZE: Tokens of a block.
        BLOCKS: Of a tile.
    """
    numbers = tile * BLOCKS + tl.arange(0, BLOCKS)
    there = numbers * BLOCK_SIZE < length
    block = tl.load(blocks + numbers, mask=there, other=0).to(tl.int64)
    header = header_of(cache, block, kv_head, BLOCK_BYTES, OFFSET, STRIDE)
    wanted = tl.minimum(BLOCK_SIZE, length - numbers * BLOCK_SIZE)
    short = there & (coded_tokens(header, tag, there) < wanted)
    end = tl.max(tl.where(short, numbers + 1, 0), axis=0)
    return tl.min(tl.where(short, numbers, end), axis=0), end


@triton.jit
def tokens_without_codes(
    cache,
    blocks,
    number,
    length,
    tag,
    kv_head,
    BLOCK_BYTES: tl.constexpr,
    OFFSET: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """One block's first token without a code, the one after its last, and a pointer to the block.

    Args:
        cache: See `span_without_codes`; so the others.
        blocks: Likewise.
        number: Of the sequence's blocks.
        length: Likewise.
        tag: Likewise.
        kv_head: Likewise.
        BLOCK_BYTES: Likewise.
        OFFSET: Likewise.
        STRIDE: Likewise.
        BLOCK_SIZE: Likewise.
    """
    block = tl.load(blocks + number).to(tl.int64)
    header = header_of(cache, block, kv_head, BLOCK_BYTES, OFFSET, STRIDE)
    end = tl.minimum(BLOCK_SIZE, length - number * BLOCK_SIZE)
    memory = (cache.to(tl.pointer_type(tl.uint8)) + block * BLOCK_BYTES).to(cache.dtype)
    return coded_tokens(header, tag, end > 0), end, memory


@triton.jit
def block_to_encode(lengths, BLOCK_SIZE: tl.constexpr, IS_LAST: tl.constexpr):
    """What the programs of one place of a grid's first axis encode.

    Args:
        lengths: Pointer to the sequences' keys.
        BLOCK_SIZE: Tokens of a block.
        IS_LAST: Whether it is each sequence's last block; else every block of the only one.

    Returns:
        The sequence, which of its blocks, and how many of the block's tokens; not positive where
        there is nothing to do.
    """
    if IS_LAST:
        sequence = tl.program_id(0)
        length = tl.load(lengths + sequence)
        number = tl.maximum(length - 1, 0) // BLOCK_SIZE
    else:
        sequence = tl.program_id(0) * 0
        length = tl.load(lengths)
        number = tl.program_id(0)
    return sequence, number, tl.minimum(BLOCK_SIZE, length - number * BLOCK_SIZE)


@launched
def _note_codes(
    cache,
    block_table,
    rows,
    lengths,
    places,
    tags,
    table_stride,
    BLOCK_BYTES: tl.constexpr,
    OFFSET: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    IS_LAST: tl.constexpr,
):
    head = tl.program_id(1)
    sequence, number, end = block_to_encode(lengths, BLOCK_SIZE, IS_LAST)
    if end > 0:
        row = tl.load(rows + sequence).to(tl.int64)
        block = tl.load(block_table + row * table_stride + number).to(tl.int64)
        header = header_of(cache, block, head, BLOCK_BYTES, OFFSET, STRIDE)
        tag = tl.load(tags + tl.load(places + sequence))
        count = tl.maximum(coded_tokens(header, tag, end > 0), end)
        tl.store(header, count.to(tl.int64))
        tl.store(header + 1, tag)


@launched
def _note_writes(
    cache,
    slots,
    count,
    BLOCK_BYTES: tl.constexpr,
    OFFSET: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    HEADS_TILE: tl.constexpr,
    TOKENS: tl.constexpr,
):
    tokens = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    slot = tl.load(slots + tokens, mask=tokens < count, other=-1)[:, None]
    heads = tl.arange(0, HEADS_TILE)[None, :]
    mask = (slot >= 0) & (heads < HEADS)
    block = tl.where(mask, slot // BLOCK_SIZE, 0)
    header = header_of(cache, block, heads, BLOCK_BYTES, OFFSET, STRIDE)
    # Of one block several tokens may be written, by any programs: the first of them counts.
    tl.atomic_min(header, tl.where(mask, slot % BLOCK_SIZE, 0), mask=mask)


@launched
def _digest_keys(
    cache,
    block_table,
    rows,
    count,
    digest,
    table_stride,
    BLOCK_ELEMENTS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    CHANNELS: tl.constexpr,
    TOKENS: tl.constexpr,
    BITS: tl.constexpr,
):
    number, head = tl.program_id(0), tl.program_id(1)
    row = tl.load(rows).to(tl.int64)
    block = tl.load(block_table + row * table_stride + number).to(tl.int64)
    channels = tl.arange(0, CHANNELS)[None, :]
    keys = cache.to(tl.pointer_type(BITS)) + block * BLOCK_ELEMENTS + channels
    sums = tl.zeros([TOKENS, CHANNELS], tl.int64)
    for start in tl.range(0, tl.minimum(BLOCK_SIZE, count - number * BLOCK_SIZE), TOKENS):
        tokens = start + tl.arange(0, TOKENS)[:, None]
        places = number * BLOCK_SIZE + tokens
        mask = (tokens < BLOCK_SIZE) & (places < count) & (channels < HEAD_SIZE)
        bits = tl.load(keys + (head * BLOCK_SIZE + tokens) * (2 * HEAD_SIZE), mask=mask, other=0)
        # What is added is of a number and its place, so that any order gives the same sum.
        place = (places * tl.num_programs(1) + head).to(tl.uint64) * HEAD_SIZE
        place = (place + channels.to(tl.uint64)) << 32
        own = place | (bits.to(tl.int64).to(tl.uint64) & 0xFFFFFFFF)
        sums += tl.where(mask, mixed(own).to(tl.int64), 0)
    tl.atomic_add(digest, tl.sum(tl.sum(sums, 1), 0))


def note_writes(kv_cache: torch.Tensor, place: tuple[int, int], slots: torch.Tensor) -> None:
    """Takes the codes of written places back, and those behind them in their blocks.

    Args:
        kv_cache: See the package; so the others.
        place: Of the index.
        slots: Where keys were written.
    """
    count, heads = slots.shape[0], kv_cache.shape[1]
    if count == 0:
        return
    at_once = rows_at_once(padded(heads), most=128)
    _note_writes[(-(-count // at_once),)](
        kv_cache,
        slots,
        count,
        BLOCK_BYTES=block_bytes(kv_cache),
        OFFSET=place[0],
        STRIDE=place[1],
        BLOCK_SIZE=kv_cache.shape[2],
        HEADS=heads,
        HEADS_TILE=padded(heads),
        TOKENS=at_once,
    )


def note_codes(
    kv_cache: torch.Tensor,
    place: tuple[int, int],
    batch: DeviceBatch,
    tags: torch.Tensor,
    num_blocks: int | None,
) -> None:
    """Says in the headers of blocks that they have the codes that sequences need.

    Args:
        kv_cache: See the package; so `place`.
        place: Of the index.
        batch: Sequences, with the places of their states.
        tags: `[places]`, int64: of the states.
        num_blocks: Of the only sequence; None: each sequence's last block.
    """
    assert batch.places is not None
    programs = len(batch.lengths) if num_blocks is None else num_blocks
    _note_codes[(programs, kv_cache.shape[1])](
        kv_cache,
        batch.block_table,
        batch.rows,
        batch.lengths,
        batch.places,
        tags,
        batch.block_table.stride(0),
        BLOCK_BYTES=block_bytes(kv_cache),
        OFFSET=place[0],
        STRIDE=place[1],
        BLOCK_SIZE=kv_cache.shape[2],
        IS_LAST=num_blocks is None,
        num_warps=1,
    )


def digest_keys(
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    rows: torch.Tensor,
    count: int,
    head_size: int,
    digest: torch.Tensor,
) -> None:
    """A number that names the first keys of a sequence, with all of their bits.

    Each number and its place are mixed (SplitMix64), and the results are added up: different keys
    have the same digest by chance alone, once in 2**64 times.

    Args:
        kv_cache: See the package; so the next one.
        block_table: Of the batch.
        rows: `[1]`, int32: whose.
        count: Of keys, at least 1.
        head_size: Channels of a key.
        digest: `[1]`, int64; written.
    """
    heads, block_size = kv_cache.shape[1:3]
    channels = padded(head_size)
    digest.zero_()
    _digest_keys[(-(-count // block_size), heads)](
        kv_cache,
        block_table,
        rows,
        count,
        digest,
        block_table.stride(0),
        BLOCK_ELEMENTS=block_bytes(kv_cache) // kv_cache.itemsize,
        BLOCK_SIZE=block_size,
        HEAD_SIZE=head_size,
        CHANNELS=channels,
        TOKENS=min(padded(block_size), rows_at_once(4 * channels)),
        BITS=_BITS[kv_cache.itemsize],
    )
