"""Ranges and keys of groups as lists at once: the same keys as by flags, in the order told."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.plugin.triton.interpreter import DEVICE
from tests.plugin.triton.lists_by_flags import (
    SCALING,
    lists_by_flags,
    lists_of,
    on_device,
    reads_of,
)
from tests.plugin.triton.unit_flags import SPLIT
from vllm_sparse_plugin.paged.triton_kernels import key_lists, key_numbers
from vllm_sparse_plugin.paged.triton_kernels.key_lists import list_numbered
from vllm_sparse_plugin.paged.triton_kernels.key_numbers import (
    KeyListsWorkspace,
    KeyRows,
    number_scores,
)
from vllm_sparse_plugin.paged.triton_kernels.lists import DeviceLists
from vllm_sparse_plugin.paged.triton_kernels.pooling import PoolingWorkspace, weigh_scores

STEP = 64


@pytest.fixture(autouse=True)
def _small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key_numbers, "_SCORES_AT_ONCE", 2 * STEP)
    monkeypatch.setattr(key_lists, "CHUNK", STEP)


def listed(
    scores, kv_heads: int, wanted, lengths, ranges, every=None
) -> tuple[DeviceLists, torch.Tensor]:
    """The lists, and what was counted; `scores` are `[queries, heads, keys]`."""
    queries, heads, keys = scores.shape
    found, reads = lists_of(queries, kv_heads, keys), reads_of(queries)
    workspace = KeyListsWorkspace.of(queries * kv_heads, DEVICE)
    weights = PoolingWorkspace.of(queries, heads, keys, DEVICE)
    held, own_lengths = on_device(scores), on_device(lengths)
    weigh_scores(held, 1, SCALING, own_lengths, weights)
    rows = KeyRows(
        own_lengths,
        on_device(wanted.astype(np.int32)),
        on_device(ranges.astype(np.int32)),
        None if every is None else on_device(every),
        kv_heads,
        heads // kv_heads,
        workspace,
    )
    number_scores(held, rows, SCALING, weights)
    list_numbered(held, rows, found, reads)
    # The next launch counts its programs from 0 again.
    assert not workspace.states[:, 5].any()
    return found, reads


def check(scores, kv_heads: int, wanted, lengths, ranges, every=None) -> None:
    """Against lists by flags; `ranges` are `[2 * ranges, queries]`."""
    right, reads = lists_by_flags(scores, 1, kv_heads, wanted, lengths, ranges, every, SPLIT)
    found, own_reads = listed(scores, kv_heads, wanted, lengths, ranges, every)
    assert torch.equal(found.counts, right.counts)
    assert torch.equal(own_reads, reads)
    for item, count in enumerate(right.counts.tolist()):
        own = found.tokens[item, :count]
        assert torch.equal(own.sort()[0], right.tokens[item, :count])
        # In two runs that ascend, at most.
        assert int((own[1:] < own[:-1]).sum()) <= 1


@pytest.mark.parametrize(
    ("heads", "kv_heads", "spread", "peak", "programs"),
    [
        (4, 2, 1.0, 0.0, 1024),
        (2, 1, 1.0, 55.0, 1),
        (2, 1, 12.0, 0.0, 1024),
        (2, 1, 0.2, 0.0, 1),
        (3, 1, 1.0, 55.0, 1024),
        (7, 1, 1.0, 0.0, 1024),
    ],
)
def test_the_same_keys_as_by_flags(
    heads: int,
    kv_heads: int,
    spread: float,
    peak: float,
    programs: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Edges of steps and of parts, many or few; ties; steep scores, flat ones, and one of all."""
    monkeypatch.setattr(key_numbers, "_PROGRAMS", programs)
    random = np.random.default_rng(heads)
    keys = 24 * STEP
    lengths = [0, 1, STEP, STEP + 1, 16 * STEP, 16 * STEP + 1, 23 * STEP - 5, keys]
    lengths = np.array(lengths, np.int32)
    shape = (len(lengths), heads, keys)
    scores = (spread * random.standard_normal(shape) / SCALING).astype(np.float32)
    scores[:, :, ::3] = 0.5  # ties
    scores[:, :, 7] += peak / SCALING
    wanted = np.array([3, 1, 0, 2, 400, 5000, 170, 300])
    for ranges in (
        np.zeros((0, len(lengths))),
        np.stack([lengths * 0, lengths * 0 + 130, lengths - 140, lengths]),
        np.stack([lengths * 0 - 4, lengths * 0 + 200, lengths * 0 + 2, lengths // 2]),
    ):
        check(scores, kv_heads, wanted, lengths, ranges)
    every = np.where(np.arange(len(lengths)) % 2, lengths, 0).astype(np.int32)
    check(scores, kv_heads, wanted, lengths, np.zeros((2, len(lengths))), every)


def test_keys_without_a_finite_score() -> None:
    """A head with none gives no shares; where no head has one, the first keys are as good."""
    scores = np.random.default_rng(1).standard_normal((2, 4, 256)).astype(np.float32)
    scores[0, 1], scores[1, :2] = -np.inf, -np.inf
    lengths = np.array([256, 200], np.int32)
    check(scores, 2, np.array([20, 30]), lengths, np.zeros((0, 2)))


@pytest.mark.parametrize("value", [np.nan, 1e9])
@pytest.mark.parametrize("keys", [slice(None), slice(5, 250), slice(7, 8)])
def test_whatever_a_model_computes_lists_are_of_the_row(value: float, keys: slice) -> None:
    """Attention looks their keys up in the block table. (Which they are, nobody can say.)"""
    scores = np.random.default_rng(2).standard_normal((1, 2, 3 * STEP)).astype(np.float32)
    scores[0, 1, keys] = value
    length, wanted = 3 * STEP - 5, 40
    lists, _ = listed(
        scores, 1, np.array([wanted]), np.array([length], np.int32), np.array([[0], [4]])
    )
    found = lists.tokens[0, : int(lists.counts[0])].tolist()
    assert len(found) == wanted + 4
    assert len(set(found)) == len(found)
    assert all(0 <= key < length for key in found)


@settings(deadline=None, max_examples=15)
@given(
    length=st.integers(0, 70),
    begins=st.tuples(st.integers(-3, 75), st.integers(-3, 75)),
    sizes=st.tuples(st.integers(0, 30), st.integers(0, 80)),
    wanted=st.integers(-1, 80),
    values=st.integers(1, 6),
    seed=st.integers(0, 5),
)
def test_any_ranges(length: int, begins, sizes, wanted: int, values: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    scores = random.integers(0, values, (1, 2, 80)).astype(np.float32)
    (first, other), (size, other_size) = begins, sizes
    ranges = np.array([[first], [first + size], [other], [other + other_size]])
    check(scores, 1, np.array([wanted]), np.array([length], np.int32), ranges)


def test_what_does_not_fit_is_refused() -> None:
    ones = torch.ones(1, dtype=torch.int32, device=DEVICE)
    reads = torch.zeros(1, 3, dtype=torch.int64, device=DEVICE)
    ranges = torch.zeros(6, 1, dtype=torch.int32, device=DEVICE)
    scores = torch.zeros(1, 4, 128, device=DEVICE)
    workspace = KeyListsWorkspace.of(2, DEVICE)
    with pytest.raises(ValueError, match="3 ranges"):
        KeyRows(ones, ones, ranges, None, 2, 2, workspace)
    with pytest.raises(ValueError, match="1 query head for each KV head"):
        KeyRows(ones, ones, ranges[:2], None, 2, 1, workspace)
    with pytest.raises(ValueError, match="for 1 rows cannot hold 2"):
        KeyRows(ones, ones, ranges[:2], None, 2, 2, KeyListsWorkspace.of(1, DEVICE))
    rows = KeyRows(ones, ones, ranges[:2], None, 2, 2, workspace)
    with pytest.raises(ValueError, match="too small"):
        number_scores(scores, rows, 1.0, PoolingWorkspace.of(1, 2, 128, DEVICE))
    for lists in (
        lists_of(1, 1, 128),
        lists_of(1, 2, 112),
        DeviceLists.of(1, 2, 1, 128, True, DEVICE),
    ):
        with pytest.raises(ValueError, match="cannot hold"):
            list_numbered(scores, rows, lists, reads)
