"""`Mask` against a plain list of weights."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_attention_hub.sparse_attention.utils.mask import Mask
from sparse_attention_hub.sparse_attention.utils.mask_attention_utils import apply_inv_mask_sum

CPU = torch.device("cpu")
SHAPE = (2, 1, 2, 4)


def dense(weights: torch.Tensor, dtype: torch.dtype = torch.float32) -> Mask:
    return Mask.create_mask_from_dense_mask(tuple(weights.shape), weights, dtype)


def by_index(weights: torch.Tensor, dtype: torch.dtype = torch.float32) -> Mask:
    return Mask.create_mask_from_indices(
        tuple(weights.shape), *dense(weights).get_index_mask(), dtype
    )


def full(dtype: torch.dtype = torch.float32) -> Mask:
    return Mask.create_full_mask(SHAPE, dtype, CPU)


def empty(dtype: torch.dtype = torch.float32) -> Mask:
    return Mask.create_empty_mask(SHAPE, dtype, CPU)


def some_weights() -> torch.Tensor:
    weights = torch.zeros(SHAPE)
    weights[0, 0, 0] = torch.tensor([1.0, 0.0, 0.5, 0.0])
    weights[1, 0, 1] = torch.tensor([0.0, 0.25, 0.0, 1.0])
    return weights


FORMS = {"dense": dense, "index": by_index}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mode", ["dense", "sparse"])
def test_apply_and_inverse(form: str, mode: str) -> None:
    weights, x = some_weights(), torch.arange(16.0).view(SHAPE) + 1
    mask = FORMS[form](weights)
    inverse = torch.where(weights > 0, x / weights.clamp(min=0.1), 0)
    assert torch.equal(mask.apply_mask(x, mode), x * weights)
    assert torch.equal(mask.apply_inv_mask(x, mode), inverse)
    assert torch.equal(apply_inv_mask_sum(x, mask), inverse.sum(-1, keepdim=True))
    assert mask.get_density() == 4 / 16
    assert mask.count_active() == 4


@pytest.mark.parametrize("mode", ["dense", "sparse"])
def test_empty_is_really_empty_and_full_is_full(mode: str) -> None:
    x = torch.ones(SHAPE)
    assert not empty().apply_mask(x, mode).any()
    assert not empty().apply_inv_mask(x, mode).any()
    assert not apply_inv_mask_sum(x, empty()).any()
    assert torch.equal(full().apply_inv_mask(x, mode), x)
    assert (empty().get_density(), full().get_density()) == (0.0, 1.0)
    assert full().get_dense_mask().eq(1).all()
    indices, ptr, data = full().get_index_mask()
    assert indices.tolist() == list(range(16))
    assert ptr.tolist() == [0, 4, 8, 12, 16]
    assert data.eq(1).all()
    assert empty().get_index_mask()[0].numel() == 0


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mode", ["dense", "sparse"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_what_is_not_selected_never_leaks(form: str, mode: str, dtype: torch.dtype) -> None:
    weights = some_weights()
    x = torch.ones(SHAPE, dtype=dtype)
    x[weights == 0] = torch.inf
    x[0, 0, 1] = torch.nan
    mask = FORMS[form](weights, dtype)
    for result in (mask.apply_mask(x, mode), mask.apply_inv_mask(x, mode)):
        assert result.isfinite().all()
        assert not result[weights == 0].any()


def test_no_memory_is_shared() -> None:
    weights = some_weights()
    mask = dense(weights)
    weights.fill_(1)
    mask.get_dense_mask().fill_(1)
    assert torch.equal(mask.get_dense_mask(), some_weights())
    indexed = by_index(some_weights())
    for tensor in indexed.get_index_mask():
        tensor.zero_()
    assert torch.equal(indexed.get_dense_mask(), some_weights())
    other = dense(torch.zeros(SHAPE))
    merged = empty().merge_mask(other)
    merged.get_dense_mask().fill_(1)
    assert not other.get_dense_mask().any()


def test_duplicates_the_last_one_counts_once() -> None:
    mask = Mask.create_mask_from_indices(
        (2, 3),
        torch.tensor([2, 0, 2, 4]),
        torch.tensor([0, 3, 4]),
        torch.tensor([0.5, 1.0, 0.25, 1.0]),
        torch.float32,
    )
    assert mask.get_dense_mask().tolist() == [[1.0, 0.0, 0.25], [0.0, 1.0, 0.0]]
    assert mask.get_density() == 3 / 6


@pytest.mark.parametrize("mask_type", ["index", "dense"])
@pytest.mark.parametrize("mode", ["dense", "sparse"])
def test_row_wise_indices(mask_type: str, mode: str) -> None:
    mask = Mask.create_from_row_wise_idx(
        (2, 4),
        torch.tensor([[3, -1, 0], [2, 2, -1]]),
        torch.tensor([[0.5, 9.0, 1.0], [0.25, 0.75, 9.0]]),
        mask_type=mask_type,
        use_padding=True,
        mode=mode,
    )
    assert mask.get_dense_mask().tolist() == [[1.0, 0.0, 0.0, 0.5], [0.0, 0.0, 0.75, 0.0]]
    assert mask.from_index == (mask_type == "index")


@pytest.mark.parametrize("mode", ["dense", "sparse"])
def test_methods_with_the_mode_in_their_name(mode: str) -> None:
    weights = some_weights()
    mask, other, x = by_index(weights), dense(weights.flip(-1)), torch.rand(SHAPE)

    def named(name: str):
        return getattr(mask, f"{name}_{mode}")

    assert torch.equal(named("apply_mask")(x), mask.apply_mask(x))
    assert torch.equal(named("apply_inv_mask")(x), mask.apply_inv_mask(x))
    merged = named("merge_mask")(other)
    assert torch.equal(merged.get_dense_mask(), mask.merge_mask(other).get_dense_mask())
    assert (merged.from_dense_mask, merged.from_index) == (mode == "dense", mode == "sparse")
    rows = torch.tensor([[[[1, -1]] * 2]] * 2), torch.tensor([[[[0.5, 1.0]] * 2]] * 2)
    of_rows = getattr(Mask, f"create_from_row_wise_idx_{mode}")
    found = of_rows(SHAPE, *rows, "index", torch.float32, True)
    assert found.from_index
    assert found.get_dense_mask()[1, 0, 1].tolist() == [0, 0.5, 0, 0]
    assert named("merge_mask")(other, inplace=True) is mask


def test_merge_adds_and_cuts_off_at_one() -> None:
    one, other = some_weights(), some_weights().roll(1, -1) + some_weights()
    expected = (one + other).clamp(max=1)
    for mode in ("dense", "sparse"):
        for left in (dense(one), by_index(one)):
            merged = left.merge_mask(dense(other), mode=mode)
            assert torch.equal(merged.get_dense_mask(), expected)
            assert merged.from_index == (mode == "sparse")
            assert torch.equal(left.get_dense_mask(), one)
            assert left.merge_mask(dense(other), inplace=True, mode=mode) is left
            assert torch.equal(left.get_dense_mask(), expected)
    assert dense(one).merge_mask(full()).is_full_mask()
    assert full().merge_mask(dense(one)).is_full_mask()
    assert empty().merge_mask(empty()).is_empty_mask()
    assert torch.equal(empty().merge_mask(dense(one)).get_dense_mask(), one)
    assert torch.equal(dense(one).merge_mask(empty()).get_dense_mask(), one)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Mask((2, 2), torch.float32), "a mask needs"),
        (lambda: Mask((2, 2), torch.float32, is_full=True), "device"),
        (lambda: Mask((), torch.float32, CPU, is_full=True), "shape"),
        (
            lambda: Mask.create_mask_from_dense_mask((2, 2), torch.ones(2, 3), torch.float32),
            r"shape \(2, 2\), got \(2, 3\)",
        ),
        (
            lambda: Mask((1, 2), torch.float32, CPU, is_empty=True).apply_mask(torch.ones(2)),
            "shape",
        ),
        (lambda: empty().apply_mask(torch.ones(SHAPE), "fast"), "mode.*'fast'"),
        (lambda: empty().merge_mask(Mask((2,), torch.float32, CPU, is_full=True)), "differ"),
        (lambda: empty().merge_mask(full(), mode="fast"), "mode.*'fast'"),
    ],
)
def test_errors(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("indices", "ptr", "data", "message"),
    [
        ([0, 9], [0, 1, 2], None, r"\[0, 6\)"),
        ([0, 1], [0, 2], None, "ptr must have 3"),
        ([0, 1], [0, 1, 2], None, "disagree"),
        ([0, 1], [0, 2, 2], [1.0], "data must have 2"),
        ([0, 4], [0, 1, 3], None, "ptr must lead from 0 to 2"),
        ([0, 4], [0, 1, 1], None, "ptr must lead from 0 to 2"),
        ([0, 4], [1, 1, 2], None, "ptr must lead from 0 to 2"),
        ([0, 4], [0, 3, 2], None, "ptr must lead from 0 to 2 without a step back"),
    ],
)
def test_index_errors(indices, ptr, data, message: str) -> None:
    weights = None if data is None else torch.tensor(data)
    with pytest.raises(ValueError, match=message):
        Mask.create_mask_from_indices(
            (2, 3), torch.tensor(indices), torch.tensor(ptr), weights, torch.float32
        )


@pytest.mark.parametrize(
    ("index", "data", "options", "message"),
    [
        ([[0], [4]], [[1.0], [1.0]], {}, r"\[0, 4\)"),
        ([[0], [-1]], [[1.0], [1.0]], {}, r"\[0, 4\)"),
        ([[0]], [[1.0]], {}, "row_wise_idx must have the shape"),
        ([[0], [1]], [[1.0, 1.0], [1.0, 1.0]], {}, "data must have the shape"),
        ([[0], [1]], [[1.0], [1.0]], {"mask_type": "csr"}, "mask_type"),
        ([[0], [1]], [[1.0], [1.0]], {"mode": "csr"}, "mode"),
    ],
)
def test_row_wise_errors(index, data, options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Mask.create_from_row_wise_idx((2, 4), torch.tensor(index), torch.tensor(data), **options)


def test_repr_says_what_it_is() -> None:
    assert "is_full=True" in repr(full())
    assert "(2, 1, 2, 4)" in repr(full())


weight_lists = st.lists(
    st.sampled_from([0.0, 0.0, 0.25, 0.5, 1.0]), min_size=1, max_size=12
).flatmap(lambda row: st.lists(st.permutations(row), min_size=1, max_size=4))


@given(weight_lists, st.randoms(use_true_random=False))
@settings(max_examples=150, deadline=None)
def test_every_form_agrees_with_a_list(rows: list[list[float]], random) -> None:
    other_rows = [random.sample(row, len(row)) for row in rows]
    weights, others = torch.tensor(rows), torch.tensor(other_rows)
    merged = [
        [min(1.0, a + b) for a, b in zip(row, other, strict=True)]
        for row, other in zip(rows, other_rows, strict=True)
    ]
    for form in FORMS.values():
        mask = form(weights)
        assert mask.get_dense_mask().tolist() == rows
        indices, ptr, data = mask.get_index_mask()
        width = len(rows[0])
        for number, row in enumerate(rows):
            part = slice(int(ptr[number]), int(ptr[number + 1]))
            listed = {
                int(i) - number * width: float(w)
                for i, w in zip(indices[part], data[part], strict=True)
            }
            assert listed == {k: w for k, w in enumerate(row) if w > 0}
        for other_form in FORMS.values():
            for mode in ("dense", "sparse"):
                assert mask.merge_mask(other_form(others), mode=mode).get_dense_mask().tolist() == (
                    merged
                )
