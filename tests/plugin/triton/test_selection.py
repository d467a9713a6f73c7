"""Top-k on the device: the pages that the numba kernel and sorting choose, bit for bit."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.plugin.triton.interpreter import DEVICE
from tests.plugin.triton.unit_flags import IN_CHUNKS, ONE_PROGRAM, POISON, SPLIT, WAYS, poisoned
from vllm_sparse_plugin.paged.kernels import pooling as numba_pooling
from vllm_sparse_plugin.paged.kernels import selection as numba_selection
from vllm_sparse_plugin.paged.triton_kernels import selection
from vllm_sparse_plugin.paged.triton_kernels.pooling import PoolingWorkspace, pool_scores
from vllm_sparse_plugin.paged.triton_kernels.radix_workspace import RadixWorkspace
from vllm_sparse_plugin.paged.triton_kernels.selection import flag_largest

EACH_WAY = pytest.mark.parametrize("workspace", WAYS, ids=["chunks", "one", "split"])


def select_on_device(scores, page_size, selectors, counts, lengths, flags, workspace, **options):
    found = torch.from_numpy(poisoned(flags, lengths)).to(DEVICE)
    flag_largest(
        torch.from_numpy(scores).clone().to(DEVICE),
        page_size,
        selectors,
        torch.from_numpy(counts).to(DEVICE),
        options.pop("scaling", 1.0),
        torch.from_numpy(lengths).to(DEVICE),
        found,
        workspace,
        **options,
    )
    return found.cpu().numpy()


def scores_with_ties(random: np.random.Generator, *shape: int) -> np.ndarray:
    """Few values, both zeros and infinities among them; NaN where no page is, at the end."""
    levels = np.array([-np.inf, -3e38, -1.5, -1e-40, -0.0, 0.0, 1e-40, 2.0, np.inf], np.float32)
    scores = levels[random.integers(0, len(levels), shape)]
    some = random.random(shape) < 0.5
    scores[some] = random.standard_normal(shape).astype(np.float32)[some]
    return scores


@EACH_WAY
@pytest.mark.parametrize("page_size", [1, 3, 8, 16, 32])
@pytest.mark.parametrize(("selectors", "units"), [(3, 3), (1, 1), (1, 2)])
def test_the_same_pages_as_numba(
    workspace, page_size: int, selectors: int, units: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Page and tile edges, nothing and everything wanted, keys selected or sampled before."""
    monkeypatch.setattr(selection, "_KEYS_AT_ONCE", 256)  # some tiles are whole, some are not
    random = np.random.default_rng(page_size * 10 + selectors)
    edges = (0, 1, page_size, page_size + 1, 4 * page_size - 1, 65 * page_size, 999)
    lengths = np.array([*edges, 999, 999], np.int32)
    wanted = np.array([3, 1, 2, 1, 2, 20, 0, 5, 1000])
    capacity = max(65 * page_size, 1000) + 24
    pages = -(-capacity // page_size)
    scores = scores_with_ties(random, len(lengths), selectors, pages)
    for row, length in enumerate(lengths):
        scores[row, :, -(-int(length) // page_size) :] = np.nan
    shape = (len(lengths) * units, capacity)
    flags = random.choice(np.array([0, 1, 2], np.uint8), shape, p=[0.7, 0.2, 0.1])
    flags[:, 2 * page_size : 4 * page_size] = 1
    flags[:, 5 * page_size : 7 * page_size] = 2
    expected = flags.copy()
    numba_selection.flag_largest(
        scores.copy(), page_size, selectors, wanted, 1.0, lengths, expected
    )
    found = select_on_device(scores, page_size, selectors, wanted, lengths, flags, workspace)
    assert (found == poisoned(expected, lengths)).all()


@pytest.mark.parametrize("levels", [7, 100_000])
@pytest.mark.parametrize("page_size", [1, 4])
def test_long_rows_in_parts(levels: int, page_size: int) -> None:
    """Ties on both sides of the parts' edges, in rows that end in the first and last part."""
    random = np.random.default_rng(levels)
    pages = (5500, 4096, 2049, 3)
    lengths = np.array([count * page_size - (page_size > 1) for count in pages], np.int32)
    capacity = 6000 * page_size
    scores = random.integers(0, levels, (4, 1, 6000)).astype(np.float32)
    flags = (random.random((4, capacity)) < 0.2).astype(np.uint8)
    wanted = np.array([2500, 4000, 1100, 2])
    expected = flags.copy()
    numba_selection.flag_largest(scores.copy(), page_size, 1, wanted, 1.0, lengths, expected)
    for workspace in WAYS:
        found = select_on_device(scores, page_size, 1, wanted, lengths, flags, workspace)
        assert (found == poisoned(expected, lengths)).all()


@pytest.mark.parametrize("levels", [1, 3, 1 << 24])
def test_a_split_selection_leaves_its_memory_as_it_was(levels: int) -> None:
    """With all, some and hardly any numbers in a bin; empty rows, and parts without a number."""
    random = np.random.default_rng(levels)
    workspace = RadixWorkspace.of(DEVICE, max_rows=4, parts=4, long_row=1, short_row=0)
    lengths = np.array([7000, 0, 2049, 5], np.int32)
    for wanted in ([0, 0, 0, 0], [7000, 5, 3000, 9], [300, 5, 1, 2]):
        scores = random.integers(0, levels, (4, 1, 7008)).astype(np.float32)
        flags = np.zeros((4, 7008), np.uint8)
        expected, counts = flags.copy(), np.array(wanted)
        numba_selection.flag_largest(scores.copy(), 1, 1, counts, 1.0, lengths, expected)
        found = select_on_device(scores, 1, 1, counts, lengths, flags, workspace)
        assert (found == poisoned(expected, lengths)).all()
        assert not workspace.histograms.any()
        assert not workspace.states[:, 5].any()


@EACH_WAY
def test_zeros_of_both_signs_are_ties(workspace) -> None:
    scores = np.array([[[-1.0, -0.0, 0.0, -0.0, 0.0]]], np.float32)
    lengths, flags = np.array([5], np.int32), np.zeros((1, 8), np.uint8)
    found = select_on_device(scores, 1, 1, np.array([2]), lengths, flags, workspace)
    assert found[0, :5].tolist() == [0, 1, 1, 0, 0]


def test_more_rows_than_are_split(device: str) -> None:
    """Then one program takes a row, whatever its capacity; a workspace's other rows stay."""
    workspace = RadixWorkspace.of(device, max_rows=2, parts=2, long_row=1)
    assert workspace.splits(2, 1)
    assert not workspace.splits(3, 1 << 20)
    assert not RadixWorkspace.of(device, max_rows=2, parts=2, long_row=9).splits(2, 8)


@EACH_WAY
def test_a_whole_row_of_ties(workspace) -> None:
    """Whatever is left of the keys: the first ones are selected, and no more."""
    scores = np.full((1, 1, 300), 2.5, np.float32)
    lengths, flags = np.array([299], np.int32), np.zeros((1, 300), np.uint8)
    flags[0, 3] = 3
    found = select_on_device(scores, 1, 1, np.array([40]), lengths, flags, workspace)
    assert np.flatnonzero(found[0, :299]).tolist() == list(range(41))


finite = st.floats(width=32, allow_nan=False)


@settings(deadline=None, max_examples=25)
@given(
    scores=st.lists(
        st.one_of(finite, st.sampled_from([0.0, -0.0, 1.0, math.inf, -math.inf])),
        min_size=1,
        max_size=60,
    ),
    selected=st.lists(st.booleans(), min_size=60, max_size=60),
    count=st.integers(-1, 70),
    workspace=st.sampled_from(WAYS),
)
def test_the_largest_of_a_row(scores, selected, count: int, workspace) -> None:
    length = len(scores)
    flags = np.zeros((1, 64), np.uint8)
    flags[0, :length] = selected[:length]
    row = np.full((1, 1, 64), np.nan, np.float32)
    row[0, 0, :length] = scores
    lengths = np.array([length], np.int32)
    found = select_on_device(row, 1, 1, np.array([count]), lengths, flags, workspace)
    allowed = [place for place in range(length) if not selected[place]]
    ranked = sorted(allowed, key=lambda place: (-np.float32(scores[place]), place))
    chosen = {place for place in range(length) if selected[place]} | set(ranked[: max(0, count)])
    assert set(np.flatnonzero(found[0, :length]).tolist()) == chosen
    assert (found[0, length:] == POISON).all()


@pytest.mark.parametrize("page_size", [1, 16])
def test_groups_pool_their_heads_shares(page_size: int) -> None:
    """Two groups of three heads; rows of several tiles, -inf, and a row that is all -inf."""
    random = np.random.default_rng(0)
    lengths = np.array([2300 * page_size - 1, 77, 0, 1, 40 * page_size], np.int32)
    scores = random.standard_normal((5, 6, 2304)).astype(np.float32) * 5
    scores[0, 1, 100:1200] = -np.inf
    scores[4, 2] = -np.inf
    flags = np.zeros((10, 2304 * page_size), np.uint8)
    wanted = np.array([200, 10, 1, 1, 30])
    pooling = PoolingWorkspace.of(5, 6, 2304, DEVICE)
    device_lengths = torch.from_numpy(lengths).to(DEVICE)
    on_device = torch.from_numpy(scores).clone().to(DEVICE)
    pool_scores(on_device, 2, page_size, 0.3, device_lengths, pooling)
    pooled = on_device.cpu().numpy()[:, ::3]
    for row, length in enumerate(lengths):
        pages = -(-int(length) // page_size)
        for group in range(2 if pages else 0):
            logits = scores[row, 3 * group : 3 * group + 3, :pages].astype(np.float64) * 0.3
            peak = logits.max(axis=1, keepdims=True)
            powers = np.exp(logits - np.where(np.isinf(peak), 0, peak))
            mass = powers.sum(axis=1, keepdims=True)
            expected = np.divide(powers, mass, where=mass > 0, out=np.zeros_like(powers)).mean(0)
            # A few float32 roundings, and a power's error of 2 ulp.
            assert np.allclose(pooled[row, group, :pages], expected, rtol=2e-6, atol=1e-37)
    found = select_on_device(
        scores, page_size, 2, wanted, lengths, flags, SPLIT, scaling=0.3, pooling=pooling
    )
    scores[4, 2] = 0  # numba has no shares of nothing
    for workspace in (ONE_PROGRAM, IN_CHUNKS):
        again = select_on_device(
            scores, page_size, 2, wanted, lengths, flags, workspace, scaling=0.3, pooling=pooling
        )
        assert (found[:8] == again[:8]).all()
    numba_selection.flag_largest(scores.copy(), page_size, 2, wanted, 0.3, lengths, flags)
    assert (again == poisoned(flags, lengths)).all()


@pytest.mark.parametrize("units", [1, 3])
def test_pooled_rows_in_parts(units: int) -> None:
    """Shares and numbers are made in one go; units are groups, or each query head is one."""
    random = np.random.default_rng(units)
    lengths = np.array([5500, 4096, 0, 2049, 3], np.int32)
    scores = random.standard_normal((5, 6, 5504)).astype(np.float32) * 5
    scores[:, :, 1000:3000] = scores[:, :, :1] - 9  # ties on both sides of parts' edges
    flags = (random.random((10 * units, 5504)) < 0.6).astype(np.uint8)
    wanted = np.array([1500, 4000, 1, 900, 2])
    pooling = PoolingWorkspace.of(5, 6, 5504, DEVICE)
    one, split = (
        select_on_device(
            scores, 1, 2, wanted, lengths, flags, workspace, scaling=0.3, pooling=pooling
        )
        for workspace in (ONE_PROGRAM, SPLIT)
    )
    numba_selection.flag_largest(scores.copy(), 1, 2, wanted, 0.3, lengths, flags)
    assert (split == one).all()
    assert (split == poisoned(flags, lengths)).all()


def test_pooled_scores_do_not_depend_on_the_batch() -> None:
    random = np.random.default_rng(1)
    lengths = np.array([1500, 3, 2047, 0], np.int32)
    scores = torch.from_numpy(random.standard_normal((4, 4, 2048)).astype(np.float32))

    def pooled(rows: list[int]) -> torch.Tensor:
        own = scores[rows].clone().to(DEVICE)
        workspace = PoolingWorkspace.of(4, 4, 2048, DEVICE)
        workspace.peaks.fill_(torch.nan)
        workspace.masses.fill_(torch.nan)
        pool_scores(own, 2, 1, 0.5, torch.from_numpy(lengths[rows]).to(DEVICE), workspace)
        return own.cpu()

    together = pooled([0, 1, 2, 3])
    for row, length in enumerate(lengths):
        alone = pooled([row])[0, ::2, :length]
        assert torch.equal(alone, together[row, ::2, :length])
    reference = scores.numpy().copy()
    numba_pooling.pool_scores(reference, 2, 1, 0.5, lengths)
    assert np.allclose(reference[0, ::2, :1500], together[0, ::2, :1500], rtol=2e-6)


def test_pooling_needs_a_workspace() -> None:
    scores = torch.zeros(2, 4, 64, device=DEVICE)
    lengths = torch.ones(2, dtype=torch.int32, device=DEVICE)
    flags = torch.zeros(4, 64, dtype=torch.uint8, device=DEVICE)
    with pytest.raises(ValueError, match="no workspace"):
        flag_largest(scores, 1, 2, lengths, 1.0, lengths, flags, SPLIT)
    with pytest.raises(ValueError, match="too small"):
        pool_scores(scores, 2, 1, 1.0, lengths, PoolingWorkspace.of(1, 4, 64, DEVICE))
