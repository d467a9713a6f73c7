"""One engine step, sorted by how its queries attend: dense decode, dense prefill, sparse."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch

from vllm_sparse_plugin.paged.attention import QueryBatch
from vllm_sparse_plugin.paged.group_counts import GroupCounts
from vllm_sparse_plugin.step_plan import DenseRow, SparseRow, flat_queries

AnyRow = TypeVar("AnyRow", DenseRow, SparseRow)

MAX_DECODE_QUERIES = 4
"""A dense row with more queries is a prefill: its keys are then worth putting into the order that
vLLM's kernel for many queries wants."""


@dataclass(frozen=True)
class QueryGroup:
    """Queries that attend in one call.

    Attributes:
        tokens: `[num_queries]`, int64: their places among the step's flat queries.
        batch: What they see.
        rows: The rows that they belong to, in order.
    """

    tokens: torch.Tensor
    batch: QueryBatch
    rows: tuple[DenseRow | SparseRow, ...]

    def take(self, query: torch.Tensor) -> np.ndarray:
        """Their part of the step's queries `[num_tokens, num_heads, head_size]`, as float32."""
        if len(self.tokens) == len(query):  # then they are all of them, in order
            return query.float().contiguous().numpy()
        return query[self.tokens].float().numpy()

    def target(self, taken: np.ndarray, output: torch.Tensor) -> np.ndarray:
        """Where their output may be written: the step's own output, if that has the same form.

        Args:
            taken: The queries, see `take`.
            output: Of the step, of as many numbers as its queries.
        """
        is_whole = len(self.tokens) == len(output)
        if is_whole and output.dtype == torch.float32 and output.is_contiguous():
            return output.view(taken.shape).numpy()
        return np.empty_like(taken)

    def put(self, result: np.ndarray, output: torch.Tensor) -> None:
        """Brings what was written to `target` into the step's output."""
        if result.ctypes.data == output.data_ptr():
            return
        values = torch.from_numpy(result).to(output.dtype)
        if len(self.tokens) == len(output):
            output.copy_(values.view_as(output))
        else:
            output[self.tokens] = values.view(-1, *output.shape[1:])


@dataclass(frozen=True)
class SparseGroup:
    """The sparse queries of all requests with the same maskers.

    Attributes:
        config_json: The maskers.
        queries: The queries; their rows are `SparseRow`s.
        decodes: Rows of few queries, for layers that stay dense; None when there are none.
        prefills: Rows of many queries, likewise.
        counts: What they read, as layers add to it.
    """

    config_json: str
    queries: QueryGroup
    decodes: QueryGroup | None
    prefills: tuple[SparseRow, ...]
    counts: GroupCounts


@dataclass(frozen=True)
class PagedStep:
    """A step.

    Attributes:
        decodes: Dense rows of few queries; None when there are none.
        prefills: Dense rows of many queries.
        sparse: By configuration.
        block_table: `[num_rows, max_blocks]`, int32.
        whole: The dense backend's metadata, for layers with a sliding window; None without them.
    """

    decodes: QueryGroup | None
    prefills: tuple[DenseRow, ...]
    sparse: tuple[SparseGroup, ...]
    block_table: torch.Tensor
    whole: Any = None


def paged_step(
    dense: Sequence[DenseRow],
    sparse: Sequence[SparseRow],
    block_table: torch.Tensor,
    whole: Any = None,
) -> PagedStep:
    """Sorts the rows of a step.

    Args:
        dense: Dense parts of rows.
        sparse: Sparse parts.
        block_table: `[num_rows, max_blocks]`, int32.
        whole: See `PagedStep`.
    """
    table = block_table.numpy()
    decodes, prefills = _split_dense(dense, table)
    by_config: dict[str, list[SparseRow]] = {}
    for row in sparse:
        assert row.parameters.config_json is not None
        by_config.setdefault(row.parameters.config_json, []).append(row)
    return PagedStep(
        decodes=decodes,
        prefills=prefills,
        sparse=tuple(
            SparseGroup(
                config_json, _group(rows, table), *_split_dense(rows, table), GroupCounts.of(rows)
            )
            for config_json, rows in by_config.items()
        ),
        block_table=block_table,
        whole=whole,
    )


def _split_dense(
    rows: Sequence[AnyRow], table: np.ndarray
) -> tuple[QueryGroup | None, tuple[AnyRow, ...]]:
    """Rows that decode, and rows that prefill, where all of them are dense."""
    few = [row for row in rows if row.query_end - row.query_start <= MAX_DECODE_QUERIES]
    many = [row for row in rows if row.query_end - row.query_start > MAX_DECODE_QUERIES]
    return (_group(few, table) if few else None), tuple(many)


def _group(rows: Sequence[DenseRow | SparseRow], table: np.ndarray) -> QueryGroup:
    tokens, owners, lengths = flat_queries(rows)
    return QueryGroup(torch.from_numpy(tokens), QueryBatch(table, owners, lengths), tuple(rows))
