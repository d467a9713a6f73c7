"""Which decode steps CUDA graphs of a whole step can serve, before they are planned."""

from __future__ import annotations

from collections.abc import Iterable

from vllm_sparse_plugin.automatic_rows import settle_automatic
from vllm_sparse_plugin.row_table import RowTable
from vllm_sparse_plugin.step_plan import SparseRow


def fits_graphs(table: RowTable, keys: Iterable[int]) -> bool:
    """Whether graphs can serve the next queries of some requests, one of each.

    Sparse ones need the maskers that graphs hold, and nothing learned that is not there yet. What
    is decided here is what the plan of the step then finds: lengths are those of the last step and
    one more, and automatic rows are settled by the same function.

    Args:
        table: Of the engine.
        keys: Of `RowTable.rows`.
    """
    graphs = table.graphs
    if graphs.is_always_dense:
        return True
    found = (table.rows.get(key) for key in keys)
    rows = [row for row in found if row is not None and row.parameters.config_json]
    if any(row.parameters.config_json != graphs.config_json for row in rows):
        return False
    if not graphs.sequences:
        return True
    sparse = []
    known = next(iter(graphs.sequences.values()))
    for number, row in enumerate(rows):
        length = known.next_length(row)
        if length is None:
            return False
        if length > row.dense_prefix_tokens:
            sparse.append(SparseRow(number, number, number + 1, length, row.parameters))
    if table.costs is not None:
        costs, is_paid = table.costs.of_step(is_replayed=True), not graphs.has_dense_graphs
        _, sparse = settle_automatic([], sparse, costs, is_paid)
    return all(
        states.has_all_but_the_last(rows[row.row], row.seq_len)
        for states in graphs.sequences.values()
        for row in sparse
    )
