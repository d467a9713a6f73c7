"""Where keys and values are in a cache, and the parts that lists of tokens are cut into.

A cache is vLLM's tensor `[num_blocks, num_kv_heads, block_size, bytes_per_token / itemsize]`; see
`layout` for what its memory holds.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from vllm_sparse_plugin.paged.triton_kernels.grids import power_of_2

PARTS = 32
"""Of a list, at most, a power of 2: that many programs work on a long one."""
LEAST_PART = 192
"""Tokens of a part, at least."""


def parts_for(capacity: int) -> int:
    """Parts that lists of at most so many tokens need; fewer give the same result.

    Args:
        capacity: Of a list.
    """
    return min(PARTS, power_of_2(-(-capacity // LEAST_PART)))


@dataclass(frozen=True)
class DeviceBatch:
    """Which blocks and how many keys the queries of a launch see; all on the device.

    Attributes:
        block_table: `[num_rows, max_blocks]`, int32.
        rows: `[num_queries]`, int32, of the block table.
        lengths: `[num_queries]`, int32: keys that each sees; 0 = padding.
        places: `[num_queries]`, int32: where what was learned from its sequence is; None where no
            masker needs it.
    """

    block_table: torch.Tensor
    rows: torch.Tensor
    lengths: torch.Tensor
    places: torch.Tensor | None = None

    def part(self, queries: slice) -> DeviceBatch:
        """Some of the queries."""
        places = None if self.places is None else self.places[queries]
        return DeviceBatch(self.block_table, self.rows[queries], self.lengths[queries], places)


@triton.jit
def key_offsets(
    tokens, mask, blocks, kv_head, width, BLOCK_SIZE: tl.constexpr, HEAD_SIZE: tl.constexpr
):
    """The first elements of some keys, from the cache's start, int64.

    A value lies `HEAD_SIZE` elements behind its key.

    Args:
        tokens: Positions.
        mask: Which of them are meant: of the others, no block is looked up.
        blocks: Pointer to the row of the block table.
        kv_head: Whose keys.
        width: Elements of a block.
        BLOCK_SIZE: Tokens of a block.
        HEAD_SIZE: Channels of a key.
    """
    block = tl.load(blocks + tokens // BLOCK_SIZE, mask=mask, other=0).to(tl.int64)
    row = kv_head * BLOCK_SIZE + tokens % BLOCK_SIZE
    return block * width + row * (2 * HEAD_SIZE)


@triton.jit
def share_of(count, PARTS: tl.constexpr, LEAST: tl.constexpr):
    """Tokens of each part of a list: from its own length alone, see the package."""
    share = tl.cdiv(tl.cdiv(count, PARTS), 64) * 64
    return tl.maximum(share, LEAST)


@triton.jit
def load_queries(
    query,
    index,
    query_stride,
    kv_head,
    HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """The queries of a group's heads, `[ROWS, CHANNELS]`, with zeros around them."""
    heads, channels = tl.arange(0, ROWS)[:, None], tl.arange(0, CHANNELS)[None, :]
    first = index * query_stride + kv_head * HEADS * HEAD_SIZE
    mask = (heads < HEADS) & (channels < HEAD_SIZE)
    return tl.load(query + first + heads * HEAD_SIZE + channels, mask=mask, other=0.0)


@triton.jit
def score_keys(
    queries,
    cache,
    offsets,
    mask,
    HEAD_SIZE: tl.constexpr,
    CHANNELS: tl.constexpr,
    IN_FLOAT32: tl.constexpr,
):
    """Products of a group's queries and some keys, `[ROWS, tokens]`, float32.

    Keys of 8 bits are multiplied as numbers of the queries' type, which has them all.

    Args:
        queries: `[ROWS, CHANNELS]`.
        cache: Pointer.
        offsets: `[tokens]`, see `key_offsets`.
        mask: Which of them are meant; 0 for the others.
        HEAD_SIZE: Channels of a key.
        CHANNELS: The power of 2 that is not less.
        IN_FLOAT32: Whether to multiply float32s, not what the cache holds.
    """
    channels = tl.arange(0, CHANNELS)[:, None]
    inside = mask[None, :] & (channels < HEAD_SIZE)
    keys = tl.load(cache + offsets[None, :] + channels, mask=inside, other=0.0)
    if IN_FLOAT32:
        return tl.dot(queries.to(tl.float32), keys.to(tl.float32), input_precision="ieee")
    elif keys.dtype.is_fp8():
        return tl.dot(queries, keys.to(queries.dtype))
    else:
        return tl.dot(queries.to(keys.dtype), keys)


def key_value_rows(kv_cache: torch.Tensor, head_size: int) -> torch.Tensor:
    """A cache's keys and values without indices: a view.

    Args:
        kv_cache: See above.
        head_size: Channels of a key.

    Returns:
        `[num_blocks, num_kv_heads, block_size, 2 * head_size]`.
    """
    num_blocks, num_kv_heads, block_size, _ = kv_cache.shape
    row = 2 * head_size
    strides = (kv_cache.stride(0), block_size * row, row, 1)
    return kv_cache.as_strided((num_blocks, num_kv_heads, block_size, row), strides)


def block_sizes(query: torch.Tensor, kv_cache: torch.Tensor) -> dict[str, int | bool]:
    """What kernels need to know at compile time of queries and their cache.

    Args:
        query: `[num_queries, num_heads, head_size]`, the heads of a query side by side.
        kv_cache: See above.

    Raises:
        ValueError: They do not fit each other.
    """
    _, num_heads, head_size = query.shape
    num_kv_heads, block_size, width = kv_cache.shape[1:]
    is_packed = query.stride()[1:] == (head_size, 1)
    if num_heads % num_kv_heads or width < 2 * head_size or not is_packed:
        raise ValueError(
            f"queries of {tuple(query.shape)} with strides {query.stride()} do not fit a cache of "
            f"{tuple(kv_cache.shape)}"
        )
    if not kv_cache.is_contiguous():
        raise ValueError("the KV cache must be contiguous")
    heads = num_heads // num_kv_heads
    channels = max(16, power_of_2(head_size))
    multiplied = query.dtype if kv_cache.itemsize == 1 else kv_cache.dtype
    # Triton's interpreter multiplies bfloat16s wrongly.
    is_interpreted = kv_cache.device.type == "cpu"
    return {
        "KV_HEADS": num_kv_heads,
        "HEADS": heads,
        "HEAD_SIZE": head_size,
        "BLOCK_SIZE": block_size,
        # Tensor cores multiply 16 rows at once.
        "ROWS": max(16, power_of_2(heads)),
        "CHANNELS": channels,
        "IN_FLOAT32": multiplied == torch.float32
        or (is_interpreted and multiplied == torch.bfloat16),
        # A tile of keys and one of values have 16 KiB: so many bytes are asked for ahead.
        "TILE": max(16, min(64, 8192 // (channels * kv_cache.dtype.itemsize))),
    }
