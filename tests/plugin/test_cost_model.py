"""What steps cost, fitted to measured points, and what follows from it."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_sparse_plugin.paged.device.cost_model import (
    NEVER,
    AttentionCosts,
    CostModel,
    Point,
    StepCosts,
    StepLoad,
)

GRID = [(rows, rows * keys) for rows in (1, 8, 64) for keys in (1024, 8192, 32768)]
numbers = st.sampled_from([0.0, 1e-7, 3e-6, 4e-5, 1e-3])
per_keys = st.sampled_from([0.0, 1e-11, 3e-10, 2e-9])
models = st.builds(CostModel, numbers, numbers, per_keys)
seconds = st.lists(st.floats(1e-6, 1e-2), min_size=len(GRID), max_size=len(GRID))


def points(values: list[float]) -> list[Point]:
    return [Point(*place, value) for place, value in zip(GRID, values, strict=True)]


@given(models.filter(lambda model: model.constant or model.per_row or model.per_key))
@settings(deadline=None)
def test_a_formula_is_found_again(model: CostModel) -> None:
    values = [model.seconds(rows, keys) for rows, keys in GRID]
    found = CostModel.fit(points(values))
    for (rows, keys), value in zip(GRID, values, strict=True):
        assert found.seconds(rows, keys) == pytest.approx(value, rel=1e-5)
    assert (found.low, found.high) == pytest.approx((1, 1), rel=1e-5)
    if value > 0 and model.per_key * GRID[-1][1] > 0.01 * value:
        assert found.per_key == pytest.approx(model.per_key, rel=1e-2)


@given(seconds)
@settings(deadline=None)
def test_no_number_is_below_zero_and_what_was_measured_is_within_bounds(values) -> None:
    model = CostModel.fit(points(values))
    assert min(model.constant, model.per_row, model.per_key) >= 0
    for point in points(values):
        formula = model.seconds(point.rows, point.keys)
        assert model.low * formula <= point.seconds * (1 + 1e-9)
        assert point.seconds <= model.high * formula * (1 + 1e-9)


@given(seconds)
@settings(deadline=None)
def test_the_squares_of_relative_errors_are_the_least(values) -> None:
    def error(model: CostModel) -> float:
        return sum(
            (model.seconds(point.rows, point.keys) / point.seconds - 1) ** 2
            for point in points(values)
        )

    best = CostModel.fit(points(values))
    numbers = (best.constant, best.per_row, best.per_key)
    for place in range(3):
        for factor in (0.9, 0.99, 1.01, 1.1):
            other = [n * factor if i == place else n for i, n in enumerate(numbers)]
            assert error(best) <= error(CostModel(*other)) + 1e-9


@given(seconds, seconds)
@settings(deadline=None)
def test_where_it_was_measured_sparse_is_chosen_only_if_it_was_faster(dense, sparse) -> None:
    costs = AttentionCosts(CostModel.fit(points(dense)), CostModel.fit(points(sparse)))
    for (rows, keys), ours, theirs in zip(GRID, sparse, dense, strict=True):
        if costs.sparse_pays(StepLoad(rows, keys, rows, keys), launches_are_paid=False):
            assert ours < theirs * (1 + 1e-9)


@given(models, models, st.integers(1, 64))
@settings(deadline=None)
def test_the_break_even_is_the_least_number_of_keys_that_pays(dense, sparse, rows: int) -> None:
    costs = AttentionCosts(dense, sparse)

    def pays(keys: int) -> bool:
        return costs.sparse_pays(StepLoad(rows, rows * keys, rows, rows * keys), False)

    keys = costs.break_even(rows)
    if keys == NEVER:
        assert not any(pays(1 << shift) for shift in range(28))
    else:
        assert pays(keys)
        assert keys == 1 or not pays(keys - 1)


def test_few_requests_need_more_keys_than_many() -> None:
    """Numbers as computed for one H100 and 32 layers with 8 KV heads of 128 channels."""
    dense = CostModel(2e-4, 1e-6, 42e-9)
    sparse = CostModel(1.2e-3, 3e-6, 6e-9)
    costs = AttentionCosts(dense, sparse)
    found = [costs.break_even(rows) for rows in (1, 4, 16, 64)]
    assert found == sorted(found, reverse=True)
    assert 20_000 < found[0] < 40_000
    assert found[2] < 4_000
    # The launches of maskers that run anyhow cost nothing more.
    assert costs.sparse_pays(StepLoad(1, 1000, 1, 1000), launches_are_paid=True)
    assert not costs.sparse_pays(StepLoad(1, 1000, 1, 1000), launches_are_paid=False)


def test_prompt_queries_share_what_dense_attention_reads() -> None:
    costs = AttentionCosts(CostModel(0, 0, 1.0), CostModel(0, 0, 0.1))
    assert costs.sparse_pays(StepLoad(1, 5000, 2, 9999), launches_are_paid=False)
    assert not costs.sparse_pays(StepLoad(1, 5000, 512, 512 * 4700), launches_are_paid=False)


def test_groups_add_up() -> None:
    first, second = CostModel(1, 2, 3, 0.9, 1.0), CostModel(4, 5, 6, 1.0, 1.2)
    assert first + second == CostModel(5, 7, 9, 0.9, 1.2)
    graph, eager = AttentionCosts(first, second), AttentionCosts(second, first)
    both = StepCosts(eager, graph) + StepCosts(eager, graph)
    assert both == StepCosts(eager + eager, graph + graph)
    assert (StepCosts(eager, graph) + StepCosts(eager, None)).replayed is None
    assert both.of_step(True) == graph + graph
    assert both.of_step(False) == StepCosts(eager + eager, None).of_step(True) == eager + eager


@pytest.mark.parametrize("bad", [[], [Point(1, 10, 0.0)], [Point(1, 10, -1.0)]])
def test_bad_points(bad: list[Point]) -> None:
    with pytest.raises(ValueError, match="points must be measured ones of more than 0 seconds"):
        CostModel.fit(bad)


def test_one_point_is_a_constant() -> None:
    assert CostModel.fit([Point(1, 100, 2.0)]) == CostModel(2.0, 0.0, 0.0)
