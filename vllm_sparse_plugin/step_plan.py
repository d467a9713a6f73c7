"""Which queries of one engine step attend densely and which sparsely.

A row (one request's queries in this step) may be a decode, a prefill chunk, or a chunk that
crosses the end of its dense prefix. The mode of a query depends on its position alone, so it is
the same in any chunking, after preemption and after a prefix hit. (On CUDA, `automatic_rows` may
make more of a step dense afterwards.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from vllm_sparse_plugin.request_parameters import RequestParameters
from vllm_sparse_plugin.row_table import Row

if TYPE_CHECKING:
    from vllm.v1.attention.backend import CommonAttentionMetadata


@dataclass(frozen=True)
class SparseRow:
    """The sparse queries of one request in one step; they are the last ones of their row.

    Attributes:
        row: Of the block table.
        query_start: First sparse query in the step's flat queries.
        query_end: After the last one.
        seq_len: Keys that the last query sees, itself included.
        parameters: Of the request.
    """

    row: int
    query_start: int
    query_end: int
    seq_len: int
    parameters: RequestParameters


@dataclass(frozen=True)
class DenseRow:
    """The dense queries of one request in one step; they are the first ones of their row.

    Attributes: as in `SparseRow`.
    """

    row: int
    query_start: int
    query_end: int
    seq_len: int


@dataclass
class StepPlan:
    """What an attention layer needs beside the dense backend's metadata.

    Attributes:
        sparse_rows: In batch order.
        block_table: `[num_rows, max_blocks]`, int32.
        dense_tokens: Indices of dense queries in the step's flat queries, int64; empty when every
            query is sparse.
        dense_metadata: The dense backend's metadata of those queries alone; None when empty.
    """

    sparse_rows: tuple[SparseRow, ...]
    block_table: torch.Tensor
    dense_tokens: torch.Tensor
    dense_metadata: Any


def split_rows(
    query_starts: Sequence[int],
    seq_lens: Sequence[int],
    rows: Mapping[int, Row],
) -> tuple[list[DenseRow], list[SparseRow]]:
    """Splits the queries of a step by mode.

    Args:
        query_starts: `num_rows + 1` offsets of the rows in the step's flat queries.
        seq_lens: Per row, keys after this step.
        rows: Rows that are not plain dense ones.

    Returns:
        The dense and the sparse parts; a row may be in both, an empty row (padding) in none.
    """
    dense: list[DenseRow] = []
    sparse: list[SparseRow] = []
    for index, seq_len in enumerate(seq_lens):
        start, end = query_starts[index], query_starts[index + 1]
        count = end - start
        if count <= 0:
            continue
        row = rows.get(index)
        num_dense = count
        if row is not None and row.parameters.config_json is not None:
            num_dense = min(max(row.dense_prefix_tokens - (seq_len - count), 0), count)
        if num_dense:
            dense.append(DenseRow(index, start, start + num_dense, seq_len - count + num_dense))
        if row is not None and num_dense < count:
            sparse.append(SparseRow(index, start + num_dense, end, seq_len, row.parameters))
    return dense, sparse


def flat_queries(rows: Sequence[DenseRow | SparseRow]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The queries of some rows, one after the other.

    Args:
        rows: At least one.

    Returns:
        Their places among the step's flat queries, int64; their rows of the block table, and the
        keys that each sees, int32.
    """
    counts = [row.query_end - row.query_start for row in rows]
    tokens = np.concatenate([np.arange(row.query_start, row.query_end) for row in rows])
    lengths = np.concatenate(
        [
            np.arange(row.seq_len - count + 1, row.seq_len + 1, dtype=np.int32)
            for row, count in zip(rows, counts, strict=True)
        ]
    )
    return tokens, np.repeat(np.array([row.row for row in rows], np.int32), counts), lengths


def dense_part(
    common: CommonAttentionMetadata, dense: Sequence[DenseRow]
) -> tuple[CommonAttentionMetadata, torch.Tensor]:
    """The metadata of a step as if its dense queries were the whole step.

    Args:
        common: Of the whole step.
        dense: Its dense parts, at least one.

    Returns:
        The metadata, and the indices of the dense queries among the step's flat queries.
    """
    device = common.seq_lens.device
    lengths = torch.tensor([row.query_end - row.query_start for row in dense], dtype=torch.int32)
    starts = torch.zeros(len(dense) + 1, dtype=torch.int32)
    starts[1:] = lengths.cumsum(0)
    seq_lens = torch.tensor([row.seq_len for row in dense], dtype=common.seq_lens.dtype)
    rows = torch.tensor([row.row for row in dense], dtype=torch.long)
    tokens = torch.cat([torch.arange(row.query_start, row.query_end) for row in dense]).to(device)

    def pick(values: torch.Tensor | None, index: torch.Tensor) -> torch.Tensor | None:
        return None if values is None else values[index.to(values.device)]

    return (
        replace(
            common,
            query_start_loc=starts.to(device),
            query_start_loc_cpu=starts,
            seq_lens=seq_lens.to(device),
            seq_lens_cpu_upper_bound=seq_lens,
            num_reqs=len(dense),
            num_actual_tokens=int(starts[-1]),
            max_query_len=int(lengths.max()),
            max_seq_len=int(seq_lens.max()),
            block_table_tensor=common.block_table_tensor[rows.to(device)],
            slot_mapping=common.slot_mapping[tokens],
            positions=pick(common.positions, tokens),
            is_prefilling=pick(common.is_prefilling, rows),
            req_idx=None if common.req_idx is None else common.req_idx[rows.numpy()],
            _num_computed_tokens_cache=None,
            _token_to_req_indices_cache=None,
        ),
        tokens,
    )
