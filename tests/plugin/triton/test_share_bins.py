"""Bins of shares: what is found of a row fits its numbers, and few keys are left to choose from."""

import numpy as np
import pytest
import torch
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.plugin.triton.interpreter import DEVICE, kernel_of
from tests.plugin.triton.lists_by_flags import SCALING, on_device
from vllm_sparse_plugin.paged.triton_kernels import share_bins
from vllm_sparse_plugin.paged.triton_kernels.key_numbers import (
    KeyListsWorkspace,
    KeyRows,
    number_scores,
)
from vllm_sparse_plugin.paged.triton_kernels.pooling import PoolingWorkspace, weigh_scores
from vllm_sparse_plugin.paged.triton_kernels.share_bins import BINS


def left_to_choose(exponents: np.ndarray, wanted: int) -> int:
    """Checks what is found of a row, and says how many keys are left to choose from.

    Args:
        exponents: `[heads, keys]`.
        wanted: Keys.
    """
    heads, keys = exponents.shape
    scores = on_device((exponents / SCALING).astype(np.float32)[None])
    lengths, weights = (
        on_device(np.array([keys], np.int32)),
        PoolingWorkspace.of(1, heads, keys, DEVICE),
    )
    workspace = KeyListsWorkspace.of(1, DEVICE)
    nothing = torch.zeros(0, 1, dtype=torch.int32, device=DEVICE)
    counts = on_device(np.array([wanted], np.int32))
    weigh_scores(scores, 1, SCALING, lengths, weights)
    number_scores(
        scores, KeyRows(lengths, counts, nothing, None, 1, heads, workspace), SCALING, weights
    )
    numbers = scores[0, 0].view(torch.int32).cpu().numpy().view(np.uint32).astype(np.int64)
    state = workspace.states[0].cpu().numpy().view(np.uint32).astype(np.int64).tolist()
    least_listed, least_open, listed, room, rest, programs = state[:6]
    assert programs == 0
    ranks = numbers - 1
    assert int((ranks >= least_listed).sum()) == listed
    assert int(((ranks >= least_open) & (ranks < least_listed)).sum()) == rest
    assert listed + room == min(wanted, keys)
    assert room == 0 or 0 < room < rest
    return rest


def _digits_kernel(numbers, usual, digits, SIZE: tl.constexpr):
    places = tl.arange(0, SIZE)
    own, middle = tl.load(numbers + places), tl.load(usual)
    found = share_bins.digit_of(own.to(tl.uint32, bitcast=True), share_bins.usual_number(middle))
    tl.store(digits + places, found)


def _ranks_kernel(usual, ranks, SIZE: tl.constexpr):
    places = tl.arange(0, SIZE)
    found = share_bins.least_rank(places + 1, share_bins.usual_number(tl.load(usual)))
    tl.store(ranks + places, found.to(tl.int32, bitcast=True))


@pytest.mark.parametrize(
    "usual", [0.0, 1e-40, 3e-12, 2.0**-17, 7.6e-6, 0.0625, 0.3, 1.0, float("inf"), float("nan")]
)
def test_bins_have_the_numbers_that_their_bounds_say(usual: float) -> None:
    """Around each bound; and all that there can be, from 0 up to a share of 1, is in a bin."""
    middle = torch.tensor([usual], device=DEVICE)
    ranks = torch.zeros(BINS, dtype=torch.int32, device=DEVICE)
    kernel_of(_ranks_kernel)[(1,)](middle, ranks, SIZE=BINS)
    bounds = ranks.cpu().numpy().view(np.uint32).astype(np.int64)
    assert bounds[0] == 0
    assert bounds[BINS - 1] == bounds[BINS - 2] == 0xFFFFFFFF
    assert (np.diff(bounds) >= 0).all()
    shares = np.array([0.0, 1e-45, 1e-30, 1e-9, 0.5, 1.0], np.float32).view(np.uint32)
    around = bounds[1 : BINS - 2, None] + 1 + np.arange(-3, 4)
    numbers = np.concatenate([shares.astype(np.int64) | 1 << 31, around.flatten()])
    numbers = np.clip(numbers, 1 << 31, 0xFFFFFFFF)
    held = np.full(512, numbers[0])
    held[: len(numbers)] = numbers
    own = on_device(held.astype(np.uint32).view(np.int32))
    digits = torch.zeros(512, dtype=torch.int32, device=DEVICE)
    kernel_of(_digits_kernel)[(1,)](own, middle, digits, SIZE=512)
    found = digits.cpu().numpy()
    assert (found >= 1).all()
    assert (found <= BINS - 2).all()
    right = (held[:, None] - 1 >= bounds[None, :]).sum(1)
    assert found.tolist() == right.tolist()


@settings(deadline=None, max_examples=40)
@given(
    keys=st.integers(1, 1700),
    share=st.floats(0, 1),
    spread=st.sampled_from([0.0, 1e-3, 0.1, 1.0, 6.0, 40.0]),
    peak=st.sampled_from([0.0, 9.0, 80.0]),
    later=st.sampled_from([0.0, -60.0, 60.0]),
    seed=st.integers(0, 9),
)
def test_what_is_found_fits_the_numbers(
    keys: int, share: float, spread: float, peak: float, later: float, seed: int
) -> None:
    """One key, or one part of the row, may have almost everything."""
    exponents = spread * np.random.default_rng(seed).standard_normal((2, keys))
    exponents[:, 0] += peak
    exponents[:, 512:] += later
    left_to_choose(exponents, int(share * keys))


@pytest.mark.parametrize("spread", [0.1, 0.3, 1.0, 3.0, 8.0])
@pytest.mark.parametrize(
    "kind", ["plain", "a sink", "later ones more", "a few tiles more", "one tile less"]
)
def test_few_keys_are_left_to_choose_from(spread: float, kind: str) -> None:
    """Flat scores and steep ones, alone and beside what has almost everything."""
    keys = 16384
    exponents = spread * np.random.default_rng(3).standard_normal((2, keys))
    exponents[:, 0] += 11.0 * (kind == "a sink")
    exponents += np.linspace(0, 20, keys) * (kind == "later ones more")
    exponents[:, 3072:4096] += 5.0 * (kind == "a few tiles more")
    exponents[:, 3072:3584] -= 15.0 * (kind == "one tile less")
    for wanted in (keys // 50, keys // 10, keys // 5):
        assert left_to_choose(exponents, wanted) <= 0.2 * keys
