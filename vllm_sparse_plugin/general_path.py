"""The general path of the paged backends: maskers on one row's gathered keys after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from vllm_sparse_plugin.masked_attention import attend_row, attention_of
from vllm_sparse_plugin.paged.group_counts import GroupCounts
from vllm_sparse_plugin.paged.layout import BlockShape
from vllm_sparse_plugin.step_plan import DenseRow, SparseRow

AnyRow = DenseRow | SparseRow


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
) -> None:
    """Writes the output of some rows' queries, and counts what they read.

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
    """
    for place, row in enumerate(rows):
        keys, values = read(row)
        part = slice(row.query_start, row.query_end)
        attention = attention_of(config_json)
        result = attend_row(attention, query[part], keys, values, scaling, layer_index)
        target = output[part]
        target.copy_(result.output.view_as(target))
        counts.add_general(place, result.read_keys, result.visible_keys, shape)
