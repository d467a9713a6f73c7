"""How scans are divided among programs, and what tiles are loaded from blocks."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

PROGRAMS = 2048
"""That a scan starts, if it has as many tiles: some for each of a GPU's 100 to 150 processors."""

TILE_NUMBERS = 8192
"""float32s of a tile that a program has in its registers: 64 in each of 128 threads."""


def padded(count: int) -> int:
    """The axis of a tile for `count` numbers: Triton has powers of 2 only."""
    return int(triton.next_power_of_2(count))


def rows_at_once(*other_axes: int, least: int = 1, most: int = 128) -> int:
    """How many rows make a tile of at most about `TILE_NUMBERS`.

    Args:
        other_axes: Of the tile, powers of 2.
        least: Rows.
        most: Rows.
    """
    size = 1
    for axis in other_axes:
        size *= axis
    return max(least, min(most, TILE_NUMBERS // size))


def splits_of(scans: int, tiles: int) -> int:
    """Programs that share one scan: they take tiles in turn.

    It depends on shapes alone. Each score is the same whoever computes it.

    Args:
        scans: Queries * KV heads.
        tiles: Of the longest possible scan.
    """
    return max(1, min(tiles, -(-PROGRAMS // max(1, scans))))


def block_bytes(kv_cache: torch.Tensor) -> int:
    """Bytes of a block, of all KV heads.

    Raises:
        ValueError: The cache is not contiguous.
    """
    if not kv_cache.is_contiguous():
        raise ValueError(f"the KV cache must be contiguous, its strides are {kv_cache.stride()}")
    return kv_cache.stride(0) * kv_cache.itemsize


@triton.jit
def load_queries(
    query,
    head_stride,
    channels,
    inside,
    GROUP: tl.constexpr,
    GROUP_TILE: tl.constexpr,
):
    """Some channels of a group's queries, `[GROUP_TILE, columns]`, float32; zeros fill it up.

    Args:
        query: Pointer to the group's first query.
        head_stride: From one query head's to the next one's.
        channels: `[columns]`.
        inside: `[columns]`: which of them there are.
        GROUP: Query heads.
        GROUP_TILE: The same as an axis.
    """
    heads = tl.arange(0, GROUP_TILE)[:, None]
    mask = (heads < GROUP) & inside[None, :]
    values = tl.load(query + heads * head_stride + channels[None, :], mask=mask, other=0.0)
    return values.to(tl.float32)


@triton.jit
def store_scores(scores, head_stride, first, count, sums, GROUP: tl.constexpr):
    """Stores `[heads, columns]` of scores.

    Args:
        scores: Pointer to the row of the group's first head.
        head_stride: From one row to the next.
        first: Column of the first score.
        count: Columns of the whole row that may be written.
        sums: `[GROUP_TILE, columns]`, float32.
        GROUP: Query heads.
    """
    heads = tl.arange(0, sums.shape[0])[:, None]
    columns = first + tl.arange(0, sums.shape[1])[None, :]
    tl.store(scores + heads * head_stride + columns, sums, mask=(heads < GROUP) & (columns < count))


@triton.jit
def load_token_blocks(
    table,
    first,
    length,
    BLOCKS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Which blocks of the cache a tile of whole blocks is of.

    Args:
        table: Pointer to the sequence's row of the block table.
        first: Block of the sequence.
        length: Keys that the query sees.
        BLOCKS: Of the tile.
        BLOCK_SIZE: Tokens of a block.
        TOKENS: The same as an axis.

    Returns:
        The blocks `[BLOCKS, 1]`, int64, and which tokens may be loaded `[BLOCKS, TOKENS]`: whole
        blocks, since a mask that differs between neighbours would make each a load of its own.
    """
    places = first + tl.arange(0, BLOCKS)[:, None]
    there = places * BLOCK_SIZE < length
    blocks = tl.load(table + places, mask=there, other=0).to(tl.int64)
    return blocks, there & (tl.arange(0, TOKENS)[None, :] < BLOCK_SIZE)


@triton.jit
def store_block_scores(
    scores, head_stride, first, length, sums, HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr
):
    """Stores `[heads, blocks, tokens]` of scores, up to the query's length.

    Args:
        scores: Pointer to the row of the first head.
        head_stride: From one row to the next.
        first: Block of the sequence.
        length: Keys that the query sees.
        sums: `[heads, BLOCKS, TOKENS]`, float32.
        HEADS: Query heads.
        BLOCK_SIZE: Tokens of a block.
    """
    heads = tl.arange(0, sums.shape[0])[:, None, None]
    blocks = first + tl.arange(0, sums.shape[1])[None, :, None]
    tokens = tl.arange(0, sums.shape[2])[None, None, :]
    columns = blocks * BLOCK_SIZE + tokens
    target = scores + heads * head_stride + columns
    mask = (heads < HEADS) & (tokens < BLOCK_SIZE)
    if (first + sums.shape[1]) * BLOCK_SIZE <= length:
        # No mask that differs between neighbours: they are stored together.
        tl.store(target, sums, mask=mask)
    else:
        tl.store(target, sums, mask=mask & (columns < length))
