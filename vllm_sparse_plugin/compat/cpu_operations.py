"""vLLM's own CPU operations on KV caches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def cpu_write_key_value(
    key: Any, value: Any, key_cache: Any, value_cache: Any, slot_mapping: Any, isa: str
) -> None:
    """Writes keys and values into a CPU cache with vLLM's own operation (used to learn its layout).

    Args:
        key: `[num_tokens, num_kv_heads, head_size]`; `value` likewise.
        value: See `key`.
        key_cache: `[num_blocks, num_kv_heads, block_size, head_size]`; `value_cache` likewise.
        value_cache: See `key_cache`.
        slot_mapping: `[num_tokens]`, int64.
        isa: vLLM's name of the kernel's instruction set.
    """
    from vllm import _custom_ops as ops

    ops.cpu_attn_reshape_and_cache(key, value, key_cache, value_cache, slot_mapping, isa)


def cpu_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cache: torch.Tensor,
    scaling: float,
    isa: str,
    sink_logits: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of a sequence's last tokens, by vLLM's own CPU operation.

    Args:
        query: `[num_queries, num_heads, head_size]`, contiguous.
        key: `[num_keys, num_kv_heads, head_size]`; the last ones are the queries' own.
        value: Likewise.
        cache: `[blocks of the keys, num_kv_heads, 2 * block_size, head_size]`: where the operation
            wants the keys and values; overwritten.
        scaling: Of the scores.
        isa: vLLM's name of the kernel's instruction set.
        sink_logits: `[num_heads]`, of learned attention sinks; None = there are none.

    Returns:
        As `query`.
    """
    num_queries, num_keys = len(query), len(key)
    cache[-1].zero_()  # the operation multiplies what lies behind the last key by 0, NaN too
    key_cache, value_cache = cache.chunk(2, dim=2)
    slots = torch.arange(num_keys)
    cpu_write_key_value(key, value, key_cache, value_cache, slots, isa)
    blocks = torch.arange(len(cache), dtype=torch.int32)[None]
    attend = cpu_attend(num_queries, num_keys, blocks, scaling, isa, sink_logits)
    return attend(query, key_cache, value_cache)


def cpu_attend(
    num_queries: int,
    num_keys: int,
    block_table: torch.Tensor,
    scaling: float,
    isa: str,
    sink_logits: torch.Tensor | None = None,
) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    """Causal attention of one sequence's last tokens on a cache of vLLM's own order.

    Args:
        num_queries: The last tokens.
        num_keys: Of the sequence.
        block_table: `[1, num_blocks]`, int32.
        scaling: Of the scores.
        isa: vLLM's name of the kernel's instruction set.
        sink_logits: `[num_heads]`, of learned attention sinks; None = there are none.

    Returns:
        A function of the query `[num_queries, num_heads, head_size]`, contiguous, and of the key
        and value caches, each `[num_blocks, num_kv_heads, block_size, head_size]`.
    """
    from vllm import _custom_ops as ops

    # The operation takes these, and bfloat16, but not float16.
    sinks = None if sink_logits is None else sink_logits.float().contiguous()
    starts = torch.tensor([0, num_queries], dtype=torch.int32)
    lengths = torch.tensor([num_keys], dtype=torch.int32)

    def attend(
        query: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor
    ) -> torch.Tensor:
        schedule = ops.cpu_attn_get_scheduler_metadata(
            num_reqs=1,
            num_heads=query.shape[1],
            num_kv_heads=key_cache.shape[1],
            head_dim=query.shape[2],
            seq_lens=lengths,
            dtype=query.dtype,
            query_start_loc=starts,
            causal=True,
            sliding_window_size=-1,
            isa=isa,
            enable_kv_split=True,
        )
        output = torch.empty_like(query)
        ops.cpu_attention_with_kv_cache(
            query=query,
            key_cache=key_cache,
            value_cache=value_cache,
            output=output,
            query_start_loc=starts,
            seq_lens=lengths,
            scale=scaling,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=block_table,
            softcap=0.0,
            scheduler_metadata=schedule,
            s_aux=sinks,
        )
        return output

    return attend


def load_cpu_operations() -> None:
    """Makes vLLM's CPU operations known to torch, outside an engine."""
    from vllm.platforms import current_platform

    current_platform.import_kernels()
