"""Which rows of a step attend densely because that takes less time in this step.

The rows are those with `min_sparse_keys` "auto" on CUDA. What pays there depends on the whole step:
launches cost the same for one row as for many. Dense attention is exact, so that no answer gets
worse by it; but answers then depend on what else is in the batch, and a prefix cache must not take
the keys of such a row for those of a row that is always sparse (see `prefix_cache`).
"""

from __future__ import annotations

from collections.abc import Sequence

from vllm_sparse_plugin.paged.device.cost_model import AttentionCosts, StepLoad
from vllm_sparse_plugin.step_plan import DenseRow, SparseRow


def load_of(rows: Sequence[SparseRow]) -> StepLoad:
    """What some rows have to do.

    Args:
        rows: The sparse parts of rows.
    """
    counts = [row.query_end - row.query_start for row in rows]
    return StepLoad(
        rows=len(rows),
        row_keys=sum(row.seq_len for row in rows),
        queries=sum(counts),
        query_keys=sum(
            count * row.seq_len - count * (count - 1) // 2
            for row, count in zip(rows, counts, strict=True)
        ),
    )


def settle_automatic(
    dense: Sequence[DenseRow],
    sparse: Sequence[SparseRow],
    costs: AttentionCosts,
    launches_are_paid: bool,
) -> tuple[list[DenseRow], list[SparseRow]]:
    """Decides for all automatic rows of a step together.

    It looks at nothing but its arguments: all KV cache groups and all ranks decide alike.

    Args:
        dense: The dense parts of rows, see `split_rows`.
        sparse: The sparse ones. Those that are not automatic stay sparse.
        costs: Of such a step.
        launches_are_paid: Whether the step has the launches of sparse attention even if all rows
            are dense.

    Returns:
        The dense and the sparse parts.
    """
    automatic = [row for row in sparse if row.parameters.is_automatic]
    fixed = [row for row in sparse if not row.parameters.is_automatic]
    paid = launches_are_paid or bool(fixed)
    if not automatic or costs.sparse_pays(load_of(automatic), paid):
        return list(dense), list(sparse)
    parts = {row.row: row for row in dense}
    for row in automatic:
        start = parts.get(row.row, row).query_start  # a row may be in both
        parts[row.row] = DenseRow(row.row, start, row.query_end, row.seq_len)
    return [parts[index] for index in sorted(parts)], fixed
