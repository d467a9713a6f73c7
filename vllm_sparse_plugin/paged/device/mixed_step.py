"""The sparse queries of a step that no CUDA graph holds: prefill, other maskers, something new."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from vllm_sparse_plugin.paged.device.planner import LayerUse
from vllm_sparse_plugin.paged.device.sequences import (
    SequenceStates,
    StepSequences,
    of_one_prefix,
)
from vllm_sparse_plugin.paged.device.step import DeviceGroup, upload
from vllm_sparse_plugin.paged.group_counts import GroupCounts
from vllm_sparse_plugin.paged.triton_kernels.cache_rows import DeviceBatch
from vllm_sparse_plugin.step_plan import SparseRow, flat_queries

if TYPE_CHECKING:
    from vllm_sparse_plugin.row_table import Row


def launches_of(
    sparse: Sequence[SparseRow],
    rows: Mapping[int, Row],
    use_of: Callable[[str], LayerUse],
    states: SequenceStates | None,
) -> list[tuple[LayerUse, list[SparseRow]]]:
    """What attends together, in order: rows with the same maskers.

    Where these learn, each row's queries have one prefix, a row's parts come one after the other,
    and no launch has more rows than there are places.

    Args:
        sparse: The sparse parts of rows.
        rows: The requests, see `split_rows`.
        use_of: What layers do with a configuration.
        states: What was learned; None where nothing is.
    """
    by_config: dict[tuple[int, str], list[SparseRow]] = {}
    for row in sparse:
        config_json = row.parameters.config_json
        assert config_json is not None
        parts = of_one_prefix(row) if use_of(config_json).learns else [row]
        for turn, part in enumerate(parts):
            by_config.setdefault((turn, config_json), []).append(part)
    launches = []
    for (_, config_json), parts in sorted(by_config.items(), key=lambda item: item[0][0]):
        use, most = use_of(config_json), len(parts)
        if use.learns and states is not None:
            # Those whose states are there come first: else each would lose its place before its
            # turn, as soon as there is one more of them than there are places.
            parts.sort(key=lambda part: not states.knows(rows[part.row]))
            most = states.places
        launches += [(use, parts[first : first + most]) for first in range(0, len(parts), most)]
    return launches


def mixed_group(
    sparse: Sequence[SparseRow],
    use: LayerUse,
    rows: Mapping[int, Row],
    states: SequenceStates | None,
    block_table: torch.Tensor,
    reads: torch.Tensor,
) -> tuple[DeviceGroup, np.ndarray]:
    """The queries of rows that attend together.

    Args:
        sparse: See `launches_of`.
        use: Of their maskers.
        rows: The requests, see `split_rows`.
        states: See `launches_of`.
        block_table: Of the step, `[num_rows, max_blocks]`, int32.
        reads: `[>= num_queries, 3]`, int64, for what they read.

    Returns:
        The group, and the keys that each query sees, `[num_queries]`, int32.
    """
    config_json = sparse[0].parameters.config_json
    assert config_json is not None
    device = block_table.device
    tokens, owners, lengths = flat_queries(sparse)
    sizes = [attention.sizes(lengths) for attention in use.attentions]
    places, sequences = np.zeros_like(owners), None
    if use.learns:
        assert states is not None
        numbers = [row.query_end - row.query_start for row in sparse]
        own, changes = states.take(
            [
                (rows[row.row], row.seq_len - number + 1, row.seq_len)
                for row, number in zip(sparse, numbers, strict=True)
            ]
        )
        places = np.repeat(own, numbers)
        last = [[row.row for row in sparse], [row.seq_len for row in sparse], own]
        table = upload(np.array(last, np.int32), device)
        sequences = StepSequences(DeviceBatch(block_table, *table), changes)
    table = upload(
        np.concatenate([owners[None], lengths[None], places[None], *sizes]).astype(np.int32), device
    )
    ends = itertools.accumulate(map(len, sizes), initial=3)
    spans = itertools.pairwise(ends)
    group = DeviceGroup(
        config_json=config_json,
        tokens=upload(tokens, device),
        batch=DeviceBatch(block_table, *table[:3]),
        sizes={
            attention: table[first:end]
            for attention, (first, end) in zip(use.attentions, spans, strict=True)
        },
        reads=reads[: len(lengths)],
        rows=tuple(sparse),
        counts=GroupCounts.of(sparse),
        sequences=sequences,
    )
    return group, lengths
