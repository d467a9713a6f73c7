"""The numbers of samplers in numba are those of the reference, bit for bit."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_attention_hub.sparse_attention.research_attention.maskers.sampling.counter_random import (  # noqa: E501
    uniform_per_key,
)
from vllm_sparse_plugin.paged.kernels.counter_random import NUMBERS, stream_of
from vllm_sparse_plugin.paged.kernels.random_order import count_unselected, draw, smallest


def all_numbers(seed: int, layer: int, head: int, position: int, num_keys: int) -> np.ndarray:
    """The numbers of every key, by drawing all of them."""
    keys, numbers = np.empty(num_keys, np.int32), np.empty(num_keys, np.uint64)
    flags = np.zeros(num_keys, np.uint8)
    stream = np.uint64(stream_of(seed, layer, head, position))
    drawn = draw(flags, num_keys, stream, num_keys, num_keys, keys, numbers)
    assert drawn == num_keys
    assert (keys == np.arange(num_keys)).all()
    return numbers


@pytest.mark.parametrize("seed", [0, 42, 2**63 - 1])
@pytest.mark.parametrize("layer", [0, 1, 79])
@pytest.mark.parametrize("position", [0, 511, 1_000_003])
def test_numbers_are_those_of_the_reference(seed: int, layer: int, position: int) -> None:
    expected = uniform_per_key(seed, layer, 3, torch.tensor([[[[position]]]]), 1300)
    for head in range(3):
        numbers = all_numbers(seed, layer, head, position, 1300)
        assert (numbers < NUMBERS).all()
        assert (numbers.astype(np.float64) * 2.0**-53 == expected[0, head, 0].numpy()).all()


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_the_smallest_are_what_a_stable_sort_puts_first(data: st.DataObject) -> None:
    number = st.one_of(st.integers(0, 5), st.integers(0, 2**53 - 1))
    numbers = np.array(data.draw(st.lists(number, min_size=1, max_size=60)), np.uint64)
    wanted = data.draw(st.integers(0, len(numbers)))
    chosen = np.empty(len(numbers), np.bool_)
    smallest(numbers, len(numbers), wanted, chosen)
    first = np.argsort(numbers, kind="stable")[:wanted]
    assert sorted(first) == np.nonzero(chosen)[0].tolist()


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_a_draw_has_the_unselected_keys_with_the_smallest_numbers(data: st.DataObject) -> None:
    length = data.draw(st.integers(1, 1200))
    seed = data.draw(st.integers(0, 2**63 - 1))
    density = data.draw(st.sampled_from([0.0, 0.3, 0.99]))
    flags = (np.random.default_rng(seed % 997).random(length) < density).astype(np.uint8)
    unselected = count_unselected(flags, length)
    assert unselected == (flags == 0).sum()
    wanted = data.draw(st.integers(0, unselected))
    keys, numbers = np.empty(length, np.int32), np.empty(length, np.uint64)
    stream = np.uint64(stream_of(seed, 3, 1, length - 1))
    drawn = draw(flags, length, stream, unselected, wanted, keys, numbers)
    every = all_numbers(seed, 3, 1, length - 1, length)
    assert wanted <= drawn <= unselected
    assert (np.diff(keys[:drawn]) > 0).all()
    assert (every[keys[:drawn]] == numbers[:drawn]).all()
    left_out = np.setdiff1d(np.nonzero(flags == 0)[0], keys[:drawn])
    if drawn and len(left_out):
        assert numbers[:drawn].max() < every[left_out].min()
