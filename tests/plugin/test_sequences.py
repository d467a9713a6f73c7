"""What the host plans for maskers that learn from sequences."""

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_sparse_plugin.graph_steps import fits_graphs
from vllm_sparse_plugin.paged.device.cost_model import AttentionCosts, CostModel, StepCosts
from vllm_sparse_plugin.paged.device.mixed_step import launches_of
from vllm_sparse_plugin.paged.device.sequences import (
    Change,
    SequenceStates,
    of_one_prefix,
    prefix_of,
)
from vllm_sparse_plugin.request_parameters import RequestParameters
from vllm_sparse_plugin.row_table import GraphState, Row, RowTable
from vllm_sparse_plugin.step_plan import SparseRow

OWN = "own"


def new_row(dense_prefix: int = 0, config_json: str | None = OWN) -> Row:
    return Row(RequestParameters(config_json, "", None, None), dense_prefix, 0)


def table_of(states: SequenceStates) -> RowTable:
    return RowTable(graphs=GraphState(captured={"a": OWN}, sequences={"a": states}))


def sparse_row(row: int, start: int, count: int, seq_len: int, config: str = OWN) -> SparseRow:
    parameters = RequestParameters(config, "", None, None)
    return SparseRow(row, start, start + count, seq_len, parameters)


def step(states: SequenceStates, *rows: tuple[Row, int]) -> tuple[list[int], tuple[Change, ...]]:
    """A decode step of rows that see so many keys."""
    states.see(rows)
    places, changes = states.take([(row, length, length) for row, length in rows])
    return places.tolist(), changes


def test_a_sequence_changes_when_it_is_new_and_when_it_has_doubled() -> None:
    states, row = SequenceStates(4), new_row()
    table = table_of(states)
    table.rows[0] = row
    changed = []
    for length in range(5, 40):
        # What is said before a step is what the step then finds.
        assert fits_graphs(table, [0]) is states.has_all_but_the_last(row, length)
        was_ready = states.has_all_but_the_last(row, length)
        places, changes = step(states, (row, length))
        assert places == [0]
        assert was_ready is not bool(changes)
        changed += [(change.length, change.prefix) for change in changes]
    assert changed == [(5, 4), (8, 8), (16, 16), (32, 32)]


def test_steps_without_sparse_queries_leave_codes_out() -> None:
    states, row = SequenceStates(4), new_row()
    step(states, (row, 9))
    states.see([(row, 10)])
    states.see([(row, 11)])
    assert not states.has_all_but_the_last(row, 12)
    assert step(states, (row, 12))[1] == (Change(0, 0, 12, 0),)  # learned already
    assert states.has_all_but_the_last(row, 13)


def test_graphs_serve_a_request_while_it_is_dense() -> None:
    states, row = SequenceStates(4), new_row(dense_prefix=20)
    table = table_of(states)
    table.rows[0] = row
    assert not fits_graphs(table, [0])  # its length is not known
    states.see([(row, 18)])
    assert fits_graphs(table, [0])
    states.see([(row, 20)])
    assert not fits_graphs(table, [0])


@pytest.mark.parametrize("per_key", [1e-9, 1e-3])
def test_graphs_serve_automatic_rows_that_their_step_makes_dense(per_key: float) -> None:
    """Whose states are not there; and where sparse pays, the step has to learn first."""
    states = SequenceStates(4)
    table = table_of(states)
    costs = AttentionCosts(CostModel(0.0, 0.0, per_key), CostModel(1e-6, 0.0, 0.0))
    table.costs = StepCosts(launched=costs, replayed=costs)
    table.graphs.has_dense_graphs = True
    automatic = Row(RequestParameters(OWN, "", None, None, 0, is_automatic=True), 0, 0)
    table.rows[0] = automatic
    states.see([(automatic, 40)])
    assert fits_graphs(table, [0]) is (per_key < 1e-6)
    table.rows[1] = fixed = new_row()
    states.see([(automatic, 40), (fixed, 40)])
    assert not fits_graphs(table, [0, 1])


def test_equal_requests_are_two() -> None:
    states = SequenceStates(2)
    first, second = new_row(), new_row()
    assert first == second
    assert step(states, (first, 4), (second, 4))[0] == [0, 1]


def test_places_of_what_was_used_last_stay() -> None:
    states = SequenceStates(2)
    rows = [new_row() for _ in range(3)]
    step(states, (rows[0], 4))
    step(states, (rows[1], 4))
    step(states, (rows[0], 5))
    places, changes = step(states, (rows[2], 9))
    assert (places, changes) == ([1], (Change(0, 1, 9, 8),))
    assert states.has_all_but_the_last(rows[0], 6)
    assert not states.has_all_but_the_last(rows[1], 5)


@given(start=st.integers(0, 70), count=st.integers(1, 70), first=st.integers(0, 9))
def test_parts_of_a_row_have_one_prefix_each(start: int, count: int, first: int) -> None:
    row = sparse_row(3, first, count, start + count)
    parts = of_one_prefix(row)
    assert [parts[0].query_start, parts[-1].query_end] == [first, first + count]
    position = start
    for part in parts:
        number = part.query_end - part.query_start
        assert number > 0
        assert part.seq_len == position + number
        assert prefix_of(position + 1) == prefix_of(part.seq_len)
        position = part.seq_len
    prefixes = [prefix_of(part.seq_len) for part in parts]
    assert prefixes == sorted(set(prefixes))
    ends = [part.query_end for part in parts]
    assert [part.query_start for part in parts[1:]] == ends[:-1]


def test_launches_have_one_configuration_in_order_and_fit_the_places() -> None:
    uses = {name: SimpleNamespace(learns=name != "plain") for name in (OWN, "other", "plain")}
    sparse = [
        sparse_row(0, 0, 20, 20),  # of prefixes 1, 2, 4, 8, 16
        sparse_row(1, 20, 1, 50),
        sparse_row(2, 21, 1, 60),
        sparse_row(3, 22, 9, 9, "plain"),
        sparse_row(4, 31, 1, 7, "other"),
    ]
    rows = {number: new_row() for number in range(5)}
    found = launches_of(sparse, rows, uses.__getitem__, SequenceStates(2))
    listed = [[(row.row, row.seq_len) for row in rows] for _, rows in found]
    assert listed[:2] == [[(0, 1), (1, 50)], [(2, 60)]]
    assert [(3, 9)] in listed
    assert [(4, 7)] in listed
    assert [rows for rows in listed if rows[0][0] == 0][1:] == [
        [(0, 3)],
        [(0, 7)],
        [(0, 15)],
        [(0, 20)],
    ]
    assert len(launches_of(sparse, rows, lambda _: uses["plain"], None)) == 3


def test_one_sequence_too_many_does_not_cost_all_others_their_places() -> None:
    states, rows = SequenceStates(4), {number: new_row() for number in range(5)}
    learned = []
    for length in range(9, 13):
        sparse = [sparse_row(number, number, 1, length) for number in rows]
        changes = []
        for _, own in launches_of(sparse, rows, lambda _: SimpleNamespace(learns=True), states):
            taken = [(rows[row.row], row.seq_len, row.seq_len) for row in own]
            changes += states.take(taken)[1]
        learned.append(sum(change.prefix > 0 for change in changes))
    assert learned == [5, 1, 1, 1]


def test_graphs_serve_rows_whose_states_are_there_in_all_groups() -> None:
    first, second = SequenceStates(2), SequenceStates(2)
    table = RowTable(graphs=GraphState(captured={"a": OWN}, sequences={"a": first, "b": second}))
    row = new_row()
    table.rows.update({0: row, 1: new_row(config_json=None)})
    assert fits_graphs(table, [1, 2])
    assert not fits_graphs(table, [0])
    step(first, (row, 5))
    assert not fits_graphs(table, [0])
    step(second, (row, 5))
    assert fits_graphs(table, [0, 1])
    for length in (6, 7):
        step(first, (row, length))
        step(second, (row, length))
    assert not fits_graphs(table, [0])  # it has doubled then
