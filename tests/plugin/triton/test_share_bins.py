"""Bins of shares: what is found of a row fits its numbers, and few keys are left to choose from."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.plugin.triton.interpreter import DEVICE
from tests.plugin.triton.lists_by_flags import SCALING, on_device
from vllm_sparse_plugin.paged.triton_kernels.key_numbers import (
    KeyListsWorkspace,
    KeyRows,
    number_scores,
)
from vllm_sparse_plugin.paged.triton_kernels.pooling import PoolingWorkspace, weigh_scores


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


@settings(deadline=None, max_examples=40)
@given(
    keys=st.integers(1, 700),
    share=st.floats(0, 1),
    spread=st.sampled_from([0.0, 1e-3, 0.1, 1.0, 6.0, 40.0]),
    peak=st.sampled_from([0.0, 9.0, 80.0]),
    seed=st.integers(0, 9),
)
def test_what_is_found_fits_the_numbers(
    keys: int, share: float, spread: float, peak: float, seed: int
) -> None:
    exponents = spread * np.random.default_rng(seed).standard_normal((2, keys))
    exponents[:, 0] += peak
    left_to_choose(exponents, int(share * keys))


@pytest.mark.parametrize("spread", [0.03, 0.3, 1.0, 3.0, 8.0])
@pytest.mark.parametrize("kind", ["plain", "a sink", "later ones more", "one tile more"])
def test_few_keys_are_left_to_choose_from(spread: float, kind: str) -> None:
    """Flat scores and steep ones, alone and beside what has almost everything."""
    keys = 8192
    exponents = spread * np.random.default_rng(3).standard_normal((2, keys))
    exponents[:, 0] += 11.0 * (kind == "a sink")
    exponents += np.linspace(0, 3, keys) * (kind == "later ones more")
    exponents[:, 3072:3584] += 5.0 * (kind == "one tile more")
    for wanted in (keys // 50, keys // 10, keys // 5):
        assert left_to_choose(exponents, wanted) <= 0.2 * keys
