"""Which rows of a step are dense because that takes less time in this step."""

import dataclasses

from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_sparse_plugin.automatic_rows import load_of, settle_automatic
from vllm_sparse_plugin.paged.device.cost_model import AttentionCosts, CostModel, StepLoad
from vllm_sparse_plugin.request_parameters import RequestParameters
from vllm_sparse_plugin.row_table import Row
from vllm_sparse_plugin.step_plan import DenseRow, SparseRow, split_rows

FIXED = RequestParameters("{}", "f", None, "fixed")
AUTOMATIC = dataclasses.replace(FIXED, tag="automatic", is_automatic=True)
COSTS = AttentionCosts(CostModel(0, 0, 1.0), CostModel(100.0, 0, 0.1))
"""Sparse pays from 112 keys on, and all keys if launches are paid."""
NEVER = AttentionCosts(CostModel(1.0, 0, 0), CostModel(2.0, 0, 1.0))


def decodes(*lengths: int, parameters: RequestParameters = AUTOMATIC) -> list[SparseRow]:
    return [SparseRow(row, row, row + 1, keys, parameters) for row, keys in enumerate(lengths)]


def test_rows_decide_together() -> None:
    for lengths, is_sparse in (((111,), False), ((112,), True), ((60, 60), True), ((50,) * 2, 0)):
        dense, sparse = settle_automatic([], decodes(*lengths), COSTS, launches_are_paid=False)
        assert (len(dense), len(sparse)) == ((0, len(lengths)) if is_sparse else (len(lengths), 0))


def test_other_rows_stay_as_they_asked() -> None:
    fixed = SparseRow(1, 1, 2, 5, FIXED)
    plain = DenseRow(2, 2, 3, 5000)
    dense, sparse = settle_automatic([plain], [*decodes(9), fixed], NEVER, False)
    assert dense == [DenseRow(0, 0, 1, 9), plain]
    assert sparse == [fixed]
    # Keys of rows that are dense in any case do not make maskers pay for others.
    assert settle_automatic([plain], decodes(50), COSTS, False)[1] == []


def test_launches_that_run_anyhow_cost_nothing_more() -> None:
    for paid, others in ((True, []), (False, [SparseRow(1, 1, 2, 5, FIXED)])):
        dense, sparse = settle_automatic([], [*decodes(50), *others], COSTS, paid)
        assert not dense
        assert sparse == [*decodes(50), *others]


def test_what_rows_have_to_do() -> None:
    rows = [SparseRow(0, 0, 3, 10, AUTOMATIC), SparseRow(1, 3, 4, 20, AUTOMATIC)]
    assert load_of(rows) == StepLoad(rows=2, row_keys=30, queries=4, query_keys=8 + 9 + 10 + 20)


@st.composite
def steps(draw: st.DrawFn) -> tuple[list[int], list[int], dict[int, Row]]:
    starts, seq_lens, rows = [0], [], {}
    for index in range(draw(st.integers(1, 6))):
        count = draw(st.sampled_from([0, 1, 1, 2, 7]))
        starts.append(starts[-1] + count)
        seq_lens.append(count + draw(st.integers(0, 200)))
        kind = draw(st.sampled_from([None, FIXED, AUTOMATIC, AUTOMATIC]))
        if kind is not None:
            prefix = draw(st.integers(0, 200))
            rows[index] = Row(kind, prefix, prefix)
    return starts, seq_lens, rows


@given(steps(), st.booleans(), st.sampled_from([COSTS, NEVER]))
@settings(deadline=None)
def test_each_query_is_in_one_part(step, paid: bool, costs: AttentionCosts) -> None:
    starts, seq_lens, rows = step
    parts = split_rows(starts, seq_lens, rows)
    dense, sparse = settle_automatic(*parts, costs, paid)
    found = sorted(
        query for part in (*dense, *sparse) for query in range(part.query_start, part.query_end)
    )
    assert found == list(range(starts[-1]))
    assert {row for row in parts[1] if row.parameters == FIXED} <= set(sparse)
    kept = [row for row in sparse if row.parameters == AUTOMATIC]
    assert kept in ([], [row for row in parts[1] if row.parameters == AUTOMATIC])
    for part in dense:
        ends_row = part.query_end == starts[part.row + 1]
        assert part.seq_len == seq_lens[part.row] or not ends_row
    if not kept:
        assert len({part.row for part in dense}) == len(dense)
