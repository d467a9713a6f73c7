"""Lists of tokens on the device: those of the numba kernels, and nothing written behind them."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.plugin.triton.interpreter import DEVICE
from tests.plugin.triton.unit_flags import poisoned
from vllm_sparse_plugin.paged.kernels import group_lists
from vllm_sparse_plugin.paged.kernels import lists as numba_lists
from vllm_sparse_plugin.paged.triton_kernels import lists as module
from vllm_sparse_plugin.paged.triton_kernels.lists import DeviceLists, list_tokens

POISON = -7


def poisoned_lists(queries: int, kv_heads: int, units: int, capacity: int, weighted: bool):
    lists = DeviceLists.of(queries, kv_heads, units, capacity, weighted, DEVICE)
    for tensor in (lists.tokens, lists.counts):
        tensor.fill_(POISON)
    lists.log_weights.fill_(torch.nan)
    lists.tile_counts.fill_(1 << 20)
    lists.tile_selected.fill_(1 << 20)
    lists.unit_weights.fill_(torch.nan)
    return lists


def check_against_numba(flags, probability, lengths, kv_heads, key_probability) -> None:
    """With weights; flags are of query heads or KV heads."""
    num_lists, capacity = len(lengths) * kv_heads, flags.shape[1]
    units = len(flags) // num_lists
    tokens = np.empty((num_lists, capacity), np.int32)
    weights = np.empty((num_lists, capacity, units), np.float32)
    counts, selected = np.empty(num_lists, np.int32), np.empty(len(flags), np.int32)
    group_lists.list_group_tokens(
        flags, probability, lengths, tokens, weights, counts, selected, key_probability
    )
    lists = poisoned_lists(len(lengths), kv_heads, units, capacity, True)
    list_tokens(
        torch.from_numpy(poisoned(flags, lengths)).to(DEVICE),
        torch.from_numpy(lengths).to(DEVICE),
        lists,
        torch.from_numpy(probability).to(DEVICE),
        torch.from_numpy(key_probability).to(DEVICE) if len(key_probability) else None,
        reads=(reads := torch.tensor([[1, 2, 3]] * len(lengths), device=DEVICE)),
        readers=5,
    )
    found_reads = reads.cpu().numpy() - [1, 2, 3]
    assert (found_reads[:, 0] == 5 * selected.reshape(len(lengths), -1).sum(1)).all()
    assert (found_reads[:, 1] == counts.reshape(len(lengths), -1).sum(1)).all()
    assert (found_reads[:, 2] == 0).all()
    assert (lists.counts.cpu().numpy() == counts).all()
    for item, count in enumerate(counts):
        assert (lists.tokens[item, :count].cpu().numpy() == tokens[item, :count]).all()
        assert (lists.tokens[item, count:] == POISON).all()
        found = lists.log_weights[item, :count].cpu().numpy()
        # A key's own probability: the error of one float32 logarithm.
        assert np.allclose(found, weights[item, :count], rtol=1e-6, atol=1e-7)
        assert lists.log_weights[item, count:].isnan().all()


@pytest.mark.parametrize(("kv_heads", "units"), [(1, 1), (2, 1), (2, 4), (1, 7), (1, 8)])
@pytest.mark.parametrize("has_own", [False, True])
@pytest.mark.parametrize("capacity", [6160, 6152], ids=["aligned", "unaligned"])
def test_lists_of_groups(
    monkeypatch: pytest.MonkeyPatch, kv_heads: int, units: int, has_own: bool, capacity: int
) -> None:
    """Sampled keys and certain ones, in rows that end at, before and behind a tile's edge.

    Programs have several tiles, of the longest row, or none.
    """
    monkeypatch.setattr(module, "programs_per_row", lambda *_: 3)
    random = np.random.default_rng(units)
    lengths = np.array([0, 1, 8, 15, 16, 17, 2047, 2048, 2049, 3000, 6150], np.int32)
    rows = len(lengths) * kv_heads * units
    densities = [0.9, 0.05, 0.03, 0.02] if has_own else [0.9, 0.06, 0.04, 0]
    flags = random.choice(np.array([0, 1, 2, 3], np.uint8), (rows, capacity), p=densities)
    flags[-units:, 1100:4200] = 0
    for row, values in enumerate(flags):
        values[lengths[row // (kv_heads * units)] :] = 0  # numba reads up to the next eight
    flags[: 3 * kv_heads * units] = 0  # nothing selected, in rows of 0, 1 and 8 keys
    probability = random.random(rows).astype(np.float32)
    probability[::3] = 0  # of those who have sampled nothing
    flags[::3][flags[::3] == 2] = 1
    own = random.random((rows if has_own else 0, capacity)).astype(np.float32)
    check_against_numba(flags, probability, lengths, kv_heads, own)


@pytest.mark.parametrize("kv_heads", [1, 3])
def test_lists_without_weights(kv_heads: int) -> None:
    random = np.random.default_rng(kv_heads)
    lengths = np.array([0, 1, 2048, 2500], np.int32)
    flags = (random.random((4 * kv_heads, 2504)) < 0.1).astype(np.uint8)
    tokens = np.empty(flags.shape, np.int32)
    counts = np.empty(len(flags), np.int32)
    numba_lists.list_tokens(flags, lengths, tokens, counts)
    lists = poisoned_lists(4, kv_heads, 1, 2504, False)
    own = torch.from_numpy(poisoned(flags, lengths)).to(DEVICE)
    list_tokens(own, torch.from_numpy(lengths).to(DEVICE), lists)
    assert lists.log_weights.numel() == 0
    assert (lists.counts.cpu().numpy() == counts).all()
    for item, count in enumerate(counts):
        assert (lists.tokens[item, :count].cpu().numpy() == tokens[item, :count]).all()
        assert (lists.tokens[item, count:] == POISON).all()


@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_any_flags(data: st.DataObject) -> None:
    flag = st.sampled_from([0, 0, 0, 1, 2])
    units = data.draw(st.integers(1, 3))
    lengths = np.array(data.draw(st.lists(st.integers(0, 40), min_size=1, max_size=4)), np.int32)
    flags = np.zeros((len(lengths) * units, 40), np.uint8)
    for row in range(len(flags)):
        size = int(lengths[row // units])
        flags[row, :size] = data.draw(st.lists(flag, min_size=size, max_size=size))
    share = st.floats(0.015625, 1.0, width=32)
    probability = data.draw(st.lists(share, min_size=len(flags), max_size=len(flags)))
    none = np.empty((0, 0), np.float32)
    check_against_numba(flags, np.array(probability, np.float32), lengths, 1, none)


def test_only_one_flag() -> None:
    """A base sample's keys among others, of two query heads."""
    flags = torch.tensor([[4, 1, 0, 2, 4, 0, 4, 4], [0, 4, 4, 1, 4, 2, 0, 4]], dtype=torch.uint8)
    lengths = torch.tensor([7], dtype=torch.int32)
    lists = poisoned_lists(1, 1, 2, 8, True)
    list_tokens(flags.to(DEVICE), lengths.to(DEVICE), lists, only=4)
    assert lists.counts.tolist() == [5]
    assert lists.tokens[0].tolist() == [0, 1, 2, 4, 6, POISON, POISON, POISON]
    reads = lists.log_weights[0, :5] == 0
    assert reads.tolist() == [[1, 0], [0, 1], [0, 1], [1, 1], [1, 0]]
    assert (lists.log_weights[0, :5][~reads] <= -1e30).all()


def test_what_does_not_fit_is_refused() -> None:
    flags = torch.zeros(2, 64, dtype=torch.uint8, device=DEVICE)
    lengths = torch.ones(2, dtype=torch.int32, device=DEVICE)
    for queries, units, capacity in ((2, 1, 56), (1, 1, 64), (1, 3, 64)):
        lists = DeviceLists.of(queries, 1, units, capacity, False, DEVICE)
        with pytest.raises(ValueError, match="cannot hold"):
            list_tokens(flags, lengths, lists)
    with pytest.raises(ValueError, match="lists with weights"):
        list_tokens(flags, lengths, DeviceLists.of(2, 1, 1, 64, False, DEVICE), lengths)
