"""The general path of the paged backends: maskers on one row's gathered keys after the other."""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable, Sequence

import torch

from vllm_sparse_plugin.masked_attention import attend_row, attention_of, queries_at_once
from vllm_sparse_plugin.paged.group_counts import GroupCounts
from vllm_sparse_plugin.paged.layout import BlockShape
from vllm_sparse_plugin.step_plan import DenseRow, SparseRow

logger = logging.getLogger(__name__)

AnyRow = DenseRow | SparseRow

_DENSE = json.dumps({"maskers": []})
COSTLY_MASKERS = json.dumps(
    {
        "maskers": [
            {"type": "oracle_top_k", "heavy_size": 0.1},
            {
                "type": "adaptive_sampling",
                "base_rate_sampling": 0.1,
                "epsilon": 0.1,
                "delta": 0.1,
                "init_offset": 0,
                "local_offset": 0,
            },
        ]
    }
)
"""Maskers that take more memory than most: 20 times that of the scores of a few queries."""


def attend_generally(
    rows: Sequence[AnyRow],
    read: Callable[[AnyRow], tuple[torch.Tensor, torch.Tensor]],
    config_json: str,
    query: torch.Tensor,
    scaling: float,
    layer_index: int,
    shape: BlockShape,
    output: torch.Tensor,
    counts: GroupCounts,
    sink_logits: torch.Tensor | None = None,
) -> None:
    """Writes the output of some rows' queries, and counts what they read.

    Where maskers want more memory than the device has, the row is dense, and so is what is counted:
    a client can ask for such maskers, and must not end the engine of all others.

    Args:
        rows: Of a step, with the same maskers.
        read: A row's keys and values, each `[1, num_kv_heads, seq_len, head_size]`.
        config_json: The maskers.
        query: `[num_tokens, num_heads, head_size]`, of the step.
        scaling: Of the scores.
        layer_index: Of the attention layer.
        shape: Of its cache.
        output: Of as many numbers as `query`; written.
        counts: Of the rows; added to.
        sink_logits: `[num_heads]`, of learned attention sinks; None = the layer has none.
    """
    for place, row in enumerate(rows):
        keys, values = read(row)
        part = slice(row.query_start, row.query_end)
        arguments = (query[part], keys, values, scaling, layer_index, sink_logits)
        result = None
        try:
            result = attend_row(attention_of(config_json), *arguments)
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
            _say_no_memory(config_json)
        if result is None:  # not in the block, which holds on to what the first try had
            result = attend_row(attention_of(_DENSE), *arguments)
        target = output[part]
        target.copy_(result.output.view_as(target))
        counts.add_general(place, result.read_keys, result.visible_keys, shape)


def _is_out_of_memory(error: RuntimeError) -> bool:
    """Of a GPU, or of a CPU, for which PyTorch has no error of its own."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


@functools.lru_cache(maxsize=1024)
def _say_no_memory(config_json: str) -> None:
    logger.warning(
        "sparse attention: not enough memory for %s on the general path: its queries are dense",
        config_json,
    )


def take_memory(
    config_json: str,
    layer_index: int,
    shape: BlockShape,
    num_keys: int,
    max_queries: int,
    device: torch.device,
) -> None:
    """Attends once, over the longest row, for vLLM to see how much memory that takes.

    Where it is not there at all, the server starts anyhow, with a warning.

    Args:
        config_json: The maskers.
        layer_index: Of the layer that has them.
        shape: Of the cache.
        num_keys: Of the row.
        max_queries: Of a step.
        device: Of the memory.
    """
    count = min(max_queries, num_keys, queries_at_once(shape.num_heads, num_keys))
    random = torch.Generator(device).manual_seed(0)  # maskers may not like zeros
    # Keys of 8 bits are read as the model's numbers, which have 16 as a rule.
    dtype = torch.bfloat16 if shape.dtype.itemsize == 1 else shape.dtype
    try:
        query, key, value = (
            torch.randn(size, dtype=dtype, device=device, generator=random)
            for size in (
                (count, shape.num_heads, shape.head_size),
                *[(1, shape.num_kv_heads, num_keys, shape.head_size)] * 2,
            )
        )
        scaling = shape.head_size**-0.5
        attend_row(attention_of(config_json), query, key, value, scaling, layer_index)
    except torch.OutOfMemoryError:
        logger.warning(
            "sparse attention: not enough memory for %s on the general path over %d keys: rows "
            "that find none are dense, and where keys and values alone do not fit (%d MiB), the "
            "engine ends; max_model_len bounds the keys",
            config_json,
            num_keys,
            shape.key_value_bytes * shape.num_kv_heads * num_keys >> 20,
        )
