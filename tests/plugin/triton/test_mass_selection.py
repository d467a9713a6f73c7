"""Top-p on the device: the keys that the numba kernel selects."""

import numpy as np
import pytest
import torch

from tests.plugin.triton.interpreter import DEVICE
from tests.plugin.triton.unit_flags import poisoned
from vllm_sparse_plugin.paged.kernels.mass_selection import flag_mass as numba_flag_mass
from vllm_sparse_plugin.paged.triton_kernels.mass_selection import MassWorkspace, flag_mass

HEADS = 1
LENGTHS = np.array([0, 1, 2, 33, 1024, 2500, 300], np.int32)
CAPACITY = 2504


def select_on_device(scores, top_p, scaling, lengths, flags) -> np.ndarray:
    found = torch.from_numpy(poisoned(flags, lengths)).to(DEVICE)
    workspace = MassWorkspace.of(*scores.shape, DEVICE)
    workspace.masses.fill_(1 << 50)
    flag_mass(
        torch.from_numpy(scores).clone().to(DEVICE),
        top_p,
        scaling,
        torch.from_numpy(lengths).to(DEVICE),
        found,
        workspace,
    )
    return found.cpu().numpy()


def numba_selection(scores, top_p, scaling, lengths, flags) -> np.ndarray:
    expected, some = flags.copy(), lengths > 0
    heads = scores.shape[1]
    rows = expected.reshape(len(lengths), heads, -1)[some].reshape(-1, flags.shape[1])
    numba_flag_mass(scores[some].copy(), top_p, scaling, lengths[some], rows)
    expected[np.repeat(some, heads)] = rows
    return poisoned(expected, lengths)


def random_rows(kind: str) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    shape = (len(LENGTHS), HEADS, CAPACITY)
    scores = {
        "many ties": lambda: random.integers(-8, 9, shape),
        "flat": lambda: random.standard_normal(shape) * 0.01,
        "peaked": lambda: random.standard_normal(shape) * 30,
        "out of reach": lambda: np.where(
            random.random(shape) < 0.9, -np.inf, random.standard_normal(shape)
        ),
    }[kind]().astype(np.float32)
    for row, length in enumerate(LENGTHS):
        scores[row, :, length:] = np.nan
    flags = (random.random((HEADS * len(LENGTHS), CAPACITY)) < 0.2).astype(np.uint8)
    flags[3] = 1  # everything selected
    flags[-1, :2] = 0, 2
    scores[-1, :, 0] = 0.5  # one of the candidates is finite
    return scores, flags


@pytest.mark.parametrize("kind", ["many ties", "flat", "peaked", "out of reach"])
@pytest.mark.parametrize("top_p", [0.0, 0.6, 0.9999, 1.0])
def test_the_same_keys_as_numba(kind: str, top_p: float) -> None:
    scores, flags = random_rows(kind)
    if kind == "out of reach":  # where numba has no weights either
        some = np.array([-1])
        scores, lengths, flags = scores[some], LENGTHS[some], flags[-HEADS:]
    else:
        lengths = LENGTHS
    expected = numba_selection(scores, top_p, 0.7, lengths, flags)
    found = select_on_device(scores, top_p, 0.7, lengths, flags)
    assert (found == expected).all()


def test_infinite_scores() -> None:
    """One key that is everything; a row of which nothing can be told."""
    scores = np.zeros((2, 1, 16), np.float32)
    scores[0, 0, 5] = np.inf
    scores[1] = -np.inf
    lengths, flags = np.array([16, 16], np.int32), np.zeros((2, 16), np.uint8)
    found = select_on_device(scores, 0.9, 1.0, lengths, flags)
    assert np.flatnonzero(found[0]).tolist() == [5]
    assert found[1].all()  # all are as heavy as the heaviest


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    scores, flags = random_rows("flat")
    together = select_on_device(scores, 0.5, 1.0, LENGTHS, flags)
    for row in (2, 5):
        own = slice(row, row + 1)
        alone = select_on_device(scores[[row]], 0.5, 1.0, LENGTHS[[row]], flags[own])
        assert (alone == together[own]).all()


def test_a_small_workspace_is_refused() -> None:
    scores, flags = random_rows("flat")
    with pytest.raises(ValueError, match="does not fit"):
        flag_mass(
            torch.from_numpy(scores),
            0.5,
            1.0,
            torch.from_numpy(LENGTHS),
            torch.from_numpy(flags),
            MassWorkspace.of(1, 1, CAPACITY, "cpu"),
        )
