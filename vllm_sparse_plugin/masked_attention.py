"""The general path: the reference's own masker objects, run on one row of the paged cache.

Always right, never fast, for every registered masker; it is the oracle of faster paths.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from sparse_attention_hub.sparse_attention.density import count_read_keys
from sparse_attention_hub.sparse_attention.research_attention import ResearchAttention
from sparse_attention_hub.sparse_attention.serialization import config_from_json
from sparse_attention_hub.sparse_attention.utils.mask_attention_utils import (
    get_masked_attention_output,
)

MAX_SCORES = 1 << 22
"""Scores held at once (16 MiB in float32); more queries are worked off in slices."""


@dataclass(frozen=True)
class RowResult:
    """One row's output and what it read.

    Attributes:
        output: `[num_queries, num_heads, head_size]`, in the queries' dtype.
        read_keys: Keys read, summed over queries and query heads.
        visible_keys: Keys that a dense step would have read, likewise.
    """

    output: torch.Tensor
    read_keys: int
    visible_keys: int


@functools.lru_cache(maxsize=256)
def attention_of(config_json: str) -> ResearchAttention:
    """The maskers of a configuration, built once per worker and configuration."""
    attention = ResearchAttention.create_from_config(config_from_json(config_json))
    if not isinstance(attention, ResearchAttention):
        raise TypeError(f"expected a ResearchAttention, got {type(attention).__name__}")
    return attention


def causal_mask(num_queries: int, num_keys: int, like: torch.Tensor) -> torch.Tensor | None:
    """The additive mask of the last `num_queries` positions of a sequence.

    Returns:
        `[1, 1, num_queries, num_keys]`, 0 or the dtype's minimum; None for one query, which sees
        every key.
    """
    if num_queries == 1:
        return None
    future = torch.ones(num_queries, num_keys, dtype=torch.bool, device=like.device)
    future = future.triu(num_keys - num_queries + 1)
    mask = torch.zeros(num_queries, num_keys, dtype=like.dtype, device=like.device)
    return mask.masked_fill(future, torch.finfo(like.dtype).min)[None, None]


def queries_at_once(num_heads: int, num_keys: int) -> int:
    """How many queries are worked off together, at least 1."""
    return max(1, MAX_SCORES // (num_heads * num_keys))


def attend_row(
    attention: ResearchAttention,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
    layer_index: int,
    sink_logits: torch.Tensor | None = None,
) -> RowResult:
    """Sparse attention of one row's last queries over all its keys.

    The queries are cut into slices of bounded memory; a masker's choice for a query depends on
    that query's visible keys alone, so the slices do not change it.

    Args:
        attention: The maskers.
        query: `[num_queries, num_heads, head_size]`, the last positions of the sequence.
        key: `[1, num_kv_heads, num_keys, head_size]`; `value` likewise.
        value: See `key`.
        scaling: Of the scores.
        layer_index: Of the attention layer.
        sink_logits: `[num_heads]`, of learned attention sinks; None = the layer has none.
    """
    num_queries, num_heads, _ = query.shape
    num_keys = key.shape[2]
    slice_size = queries_at_once(num_heads, num_keys)
    outputs, read, visible = [], 0, 0
    for start in range(0, num_queries, slice_size):
        end = min(start + slice_size, num_queries)
        last = num_keys - num_queries + end
        queries = query[start:end].transpose(0, 1)[None]
        keys, values = key[:, :, :last], value[:, :, :last]
        mask = causal_mask(end - start, last, query)
        # A fresh cache each call: what a masker keeps there must never change its result, and
        # rows come and go between steps.
        selected = attention.select(
            queries, keys, values, mask, scaling, 0.0, {}, layer_idx=layer_index
        )
        output = get_masked_attention_output(
            module=None,
            queries=queries,
            keys=keys,
            values=values,
            attention_mask=mask,
            scaling=scaling,
            dropout=0.0,
            sparse_attention_mask=selected,
            sink_logits=sink_logits,
        )
        outputs.append(output[0])
        counts = count_read_keys(selected, mask)
        read, visible = read + counts[0], visible + counts[1]
    return RowResult(torch.cat(outputs), read, visible)
