"""Reading a row's keys and values out of the blocks of the dense backend's cache.

The plugin serves dense rows with vLLM's own kernels, so the cache holds what those kernels write.
vLLM's CPU operation permutes each block to suit its instruction set (it stores keys transposed on
most, and tiles both for AMX). That order is not documented, so it is learned once per kind of block
by writing known numbers with vLLM's own operation and looking where they went.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from vllm_sparse_plugin import compat
from vllm_sparse_plugin.paged.layout import gathered

BlockReader = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""`(kv_cache, block_ids)` to keys and values, each `[num_kv_heads, num_tokens, head_size]`, for
`kv_cache` `[num_blocks, num_kv_heads, block_size, 2 * head_size]` and `block_ids` `[n]`."""


def gather_row(
    read: BlockReader, kv_cache: torch.Tensor, block_table_row: torch.Tensor, seq_len: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """One request's keys and values, contiguous and in token order.

    Args:
        read: The reader of this cache's layout.
        kv_cache: `[num_blocks, num_kv_heads, block_size, 2 * head_size]`.
        block_table_row: `[max_blocks]`, integer; entries past the sequence may be anything.
        seq_len: Tokens to read.

    Returns:
        Keys and values, each `[1, num_kv_heads, seq_len, head_size]`.
    """
    block_size = kv_cache.shape[2]
    num_blocks = -(-seq_len // block_size)
    key, value = read(kv_cache, block_table_row[:num_blocks].long())
    return key[None, :, :seq_len], value[None, :, :seq_len]


def read_token_major(
    kv_cache: torch.Tensor, block_ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Reads blocks whose rows are `key ‖ value` (vLLM's Triton and FlashAttention caches).

    See `BlockReader` for the shapes.
    """
    blocks = gathered(kv_cache, block_ids).transpose(0, 1)
    num_kv_heads, _, _, width = blocks.shape
    rows = blocks.reshape(num_kv_heads, -1, width)
    return rows[..., : width // 2], rows[..., width // 2 :]


@functools.cache
def cpu_block_reader(block_size: int, head_size: int, dtype: torch.dtype, isa: str) -> BlockReader:
    """The reader of blocks that vLLM's CPU operation writes.

    Args:
        block_size: Tokens of a block.
        head_size: Elements of a key, and of a value.
        dtype: Of the cache.
        isa: vLLM's name of the kernel's instruction set.

    Raises:
        RuntimeError: The operation does not merely reorder a block's elements.
    """
    orders = _learn_order(block_size, head_size, dtype, isa)
    restore_key, restore_value = (_restorer(order, block_size, head_size) for order in orders)

    def read(kv_cache: torch.Tensor, block_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # The operation splits a block into a half of keys and a half of values.
        halves = kv_cache.view(*kv_cache.shape[:2], 2, block_size * head_size)
        return restore_key(halves[block_ids, :, 0]), restore_value(halves[block_ids, :, 1])

    return read


def _restorer(
    order: torch.Tensor, block_size: int, head_size: int
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Undoes `order`: `[n, num_kv_heads, elements]` to `[num_kv_heads, tokens, head_size]`."""
    plain = torch.arange(block_size * head_size)
    is_plain = torch.equal(order, plain)
    is_transposed = torch.equal(order, plain.view(block_size, head_size).T.reshape(-1))
    inverse = torch.argsort(order)

    def restore(blocks: torch.Tensor) -> torch.Tensor:
        count, num_kv_heads, _ = blocks.shape
        if is_transposed:  # the usual order of keys, as a view: much cheaper than the index
            tokens = blocks.view(count, num_kv_heads, head_size, block_size).transpose(2, 3)
        else:
            ordered = blocks if is_plain else blocks[..., inverse]
            tokens = ordered.view(count, num_kv_heads, block_size, head_size)
        return tokens.transpose(0, 1).reshape(num_kv_heads, count * block_size, head_size)

    return restore


def _learn_order(
    block_size: int, head_size: int, dtype: torch.dtype, isa: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where vLLM's CPU operation puts each element of a block.

    Returns:
        For keys and for values: `order` with `stored[i] = plain[order[i]]`, both flat.
    """
    size = block_size * head_size
    element = torch.arange(size)
    orders = [torch.zeros(size, dtype=torch.long), torch.zeros(size, dtype=torch.long)]
    # Digits, since half precision counts exactly only up to 256.
    base, weight = 128, 1
    while weight < size:
        digit = ((element // weight) % base).view(block_size, 1, head_size).to(dtype)
        cache = torch.zeros(1, 1, 2 * block_size, head_size, dtype=dtype)
        key_half, value_half = cache.chunk(2, dim=2)
        slots = torch.arange(block_size)
        compat.cpu_write_key_value(digit, digit, key_half, value_half, slots, isa)
        for order, half in zip(orders, (key_half, value_half), strict=True):
            order += half.reshape(-1).long() * weight
        weight *= base
    for order in orders:
        if not torch.equal(order.sort().values, element):
            raise RuntimeError(
                f"cannot read vLLM's CPU KV cache for block size {block_size}, head size "
                f"{head_size}, {dtype}, instruction set {isa!r}: its elements are not a permutation"
            )
    return orders[0], orders[1]
