"""Samples on the device: the same keys and probabilities as the numba kernel's, bit for bit."""

import numpy as np
import pytest
import torch

from tests.plugin.triton.interpreter import DEVICE
from tests.plugin.triton.unit_flags import ONE_PROGRAM, POISON, SPLIT, WORKSPACES, poisoned
from vllm_sparse_plugin.paged.kernels.counter_random import number_of, stream_of
from vllm_sparse_plugin.paged.kernels.sampling import sample_share as numba_sample_share
from vllm_sparse_plugin.paged.triton_kernels import counter_random
from vllm_sparse_plugin.paged.triton_kernels.sampling import sample_share


def sample_on_device(share, seed, layer, heads, lengths, flags, workspace):
    found = torch.from_numpy(poisoned(flags, lengths)).to(DEVICE)
    probability = torch.full((len(flags),), -1.0, device=DEVICE)
    order = torch.full(flags.shape, POISON, dtype=torch.int32, device=DEVICE)
    sample_share(
        share,
        seed,
        layer,
        heads,
        torch.from_numpy(lengths).to(DEVICE),
        found,
        probability,
        order,
        workspace,
    )
    return found.cpu().numpy(), probability.cpu().numpy()


@WORKSPACES
@pytest.mark.parametrize("share", [0.001, 0.29, 1.0])
@pytest.mark.parametrize(
    ("heads", "units", "seed", "layer"), [(2, 2, 2**63 - 1, 3), (4, 1, 42, 79)]
)
def test_the_same_sample_as_numba(workspace, share, heads, units, seed: int, layer: int) -> None:
    """Rows without keys, with all or some of them selected, at tile edges."""
    random = np.random.default_rng(units)
    lengths = np.array([0, 1, 2, 3, 900, 2048, 2049], np.int32)
    flags = (random.random((len(lengths) * units, 2056)) < 0.2).astype(np.uint8)
    flags[3 * units, :3] = 1  # nothing left
    flags[4 * units + units - 1, 1:] = 1  # one key left, at most
    expected = flags.copy()
    probability = np.full(len(flags), -1, np.float32)
    numba_sample_share(share, seed, layer, heads, lengths, expected, probability)
    found, of_units = sample_on_device(share, seed, layer, heads, lengths, flags, workspace)
    assert (found == poisoned(expected, lengths)).all()
    assert (of_units == probability).all()


@pytest.mark.parametrize("seed", [0, 42, 2**63 - 1])
def test_the_numbers_of_a_layer(seed: int) -> None:
    """The host's part of the generator, against numba's."""
    mixed = counter_random._mixed
    for layer, head, position in ((0, 0, 0), (31, 5, 131_071), (79, 127, 1_000_003)):
        prefix = counter_random.layer_stream(seed, layer)
        assert -(1 << 63) <= prefix < 1 << 63
        stream = mixed(mixed((prefix & ((1 << 64) - 1)) ^ head) ^ position)
        assert stream == stream_of(seed, layer, head, position)
        for key in (0, 1, 99_999):
            assert mixed(stream ^ key) >> 11 == number_of(np.uint64(stream), np.uint64(key))


def test_keys_that_are_equal_in_their_first_31_bits() -> None:
    """The bound between two of them is found by the other bits."""
    length, seed = 1 << 17, 5
    keys = np.arange(length, dtype=np.uint64)
    for layer in range(20):
        with np.errstate(over="ignore"):
            bits = np.uint64(stream_of(seed, layer, 0, length - 1)) ^ keys
            bits += np.uint64(0x9E3779B97F4A7C15)
            bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            numbers = (bits ^ (bits >> np.uint64(31))) >> np.uint64(11)
        ranked = np.sort(numbers)
        pairs = np.flatnonzero(np.diff(ranked >> np.uint64(22)) == 0)
        if len(pairs):
            break
    wanted = int(pairs[0]) + 1  # the first of the pair, and not the second
    share = (wanted + 0.5) / length
    lengths, flags = np.array([length], np.int32), np.zeros((1, length), np.uint8)
    for workspace in (ONE_PROGRAM, SPLIT):
        found, _ = sample_on_device(share, seed, layer, 1, lengths, flags, workspace)
        chosen = np.flatnonzero(found[0] == 2)
        assert len(chosen) == wanted
        assert (np.sort(numbers[chosen]) == ranked[:wanted]).all()


def test_a_sample_does_not_depend_on_the_batch() -> None:
    random = np.random.default_rng(1)
    lengths = np.array([100, 900, 7], np.int32)
    flags = (random.random((6, 904)) < 0.3).astype(np.uint8)
    together, shares = sample_on_device(0.2, 9, 1, 2, lengths, flags, ONE_PROGRAM)
    for row, length in enumerate(lengths):
        own = slice(2 * row, 2 * row + 2)
        alone, share = sample_on_device(0.2, 9, 1, 2, lengths[[row]], flags[own], SPLIT)
        assert (alone[:, :length] == together[own, :length]).all()
        assert (share == shares[own]).all()
