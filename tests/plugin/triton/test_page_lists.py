"""Ranges and pages as lists at once: the same as by flags, selection and lists of flags."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.plugin.triton.interpreter import DEVICE
from tests.plugin.triton.lists_by_flags import (
    POISON,
    SCALING,
    lists_by_flags,
    lists_of,
    on_device,
    reads_of,
)
from vllm_sparse_plugin.paged.triton_kernels import page_lists, row_selection
from vllm_sparse_plugin.paged.triton_kernels.lists import DeviceLists
from vllm_sparse_plugin.paged.triton_kernels.page_lists import list_pages


def check(scores, page_size: int, kv_heads: int, wanted, lengths, ranges, every=None) -> None:
    """`scores` are `[queries, heads, pages]`, `ranges` `[2 * ranges, queries]`."""
    right, reads = lists_by_flags(scores, page_size, kv_heads, wanted, lengths, ranges, every)
    found = lists_of(len(lengths), kv_heads, right.tokens.shape[1])
    own_reads = reads_of(len(lengths))
    list_pages(
        on_device(scores),
        page_size,
        kv_heads,
        on_device(wanted.astype(np.int32)),
        SCALING,
        on_device(lengths),
        on_device(ranges.astype(np.int32)),
        None if every is None else on_device(every),
        found,
        own_reads,
    )
    assert torch.equal(found.counts, right.counts)
    assert torch.equal(own_reads, reads)
    for item, count in enumerate(right.counts.tolist()):
        assert torch.equal(found.tokens[item, :count], right.tokens[item, :count])
        assert (found.tokens[item, count:] == POISON).all()


@pytest.mark.parametrize("page_size", [1, 5, 16, 32])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (6, 2), (4, 1)])
def test_the_same_lists_as_by_flags(
    page_size: int, heads: int, kv_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Edges of pages and of chunks; ranges that are empty, overlap, or meet in a page."""
    monkeypatch.setattr(row_selection, "CHUNK", 128)
    monkeypatch.setattr(page_lists, "_TOKENS_AT_ONCE", 1024)
    random = np.random.default_rng(page_size + heads)
    pages = 160
    edges = [0, 1, page_size, page_size + 1, 128 * page_size, 128 * page_size + 1, 150 * page_size]
    lengths = np.array([*edges, pages * page_size - page_size // 2], np.int32)
    scores = random.standard_normal((len(lengths), heads, pages)).astype(np.float32)
    scores[:, :, ::3] = 0.5  # ties
    wanted = np.array([3, 1, 0, 2, 40, 200, 17, 30])
    middle = 3 * page_size + page_size // 2
    for ranges in (
        np.zeros((0, len(lengths))),
        np.stack([lengths * 0, lengths * 0 + page_size // 2]),
        np.stack([lengths * 0, lengths * 0 + middle, lengths - page_size - 1, lengths]),
        np.stack([lengths * 0 + 2, lengths * 0 + middle, lengths * 0 + middle, lengths // 2]),
        np.stack([lengths * 0 - 4, lengths * 0 + middle, lengths * 0 + 2, lengths + 9]),
    ):
        check(scores, page_size, kv_heads, wanted, lengths, ranges)
    every = np.where(np.arange(len(lengths)) % 2, lengths, 0).astype(np.int32)
    check(scores, page_size, kv_heads, wanted, lengths, np.zeros((2, len(lengths))), every)


def test_large_pages_of_long_rows() -> None:
    """A chunk of 2,048 pages of 256 tokens: both counts together have more than 32 bits."""
    pages, page_size = 2048, 256
    length = pages * page_size - 3
    for every, count in ((length, length), (0, 3 * page_size)):
        scores = torch.zeros(1, 1, pages, device=DEVICE)
        found, reads = lists_of(1, 1, pages * page_size), reads_of(1)
        ends = torch.tensor([every], dtype=torch.int32, device=DEVICE)
        ones = torch.ones(1, dtype=torch.int32, device=DEVICE)
        ranges = torch.empty(0, 1, dtype=torch.int32, device=DEVICE)
        list_pages(scores, page_size, 1, 3 * ones, 1.0, length * ones, ranges, ends, found, reads)
        assert found.counts.tolist() == [count]
        assert torch.equal(found.tokens[0, :count].cpu(), torch.arange(count, dtype=torch.int32))


@pytest.mark.parametrize("page_size", [4, 5])
def test_pages_partly_covered_at_ends_of_chunks(
    page_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_selection, "CHUNK", 128)
    random = np.random.default_rng(page_size)
    places = np.array([126, 127, 128, 129, 255, 256])
    lengths = np.full(len(places), 270 * page_size + 1, np.int32)
    scores = random.standard_normal((len(places), 2, 272)).astype(np.float32)
    for before, behind in ((1, 2), (2, 1), (page_size, 1)):
        ends = places * page_size + before
        ranges = np.stack([lengths * 0 + 1, ends, ends + page_size, ends + page_size + behind])
        check(scores, page_size, 1, np.full(len(places), 3), lengths, ranges)


@pytest.mark.parametrize("heads", [1, 3, 4, 5, 7, 12])
def test_pages_of_any_group_are_those_of_its_shares(heads: int) -> None:
    """Of scores whose shares are far from equal, so that roundings decide nothing."""
    random = np.random.default_rng(heads)
    pages, kv_heads, wanted = 70, 2, 11
    scores = 3 * random.standard_normal((2, kv_heads * heads, pages)).astype(np.float32)
    lengths = np.array([pages * 4, 61 * 4 - 1], np.int32)
    found, reads = lists_of(2, kv_heads, pages * 4), reads_of(2)
    list_pages(
        on_device(np.pad(scores, ((0, 0), (0, 0), (0, 10)))),
        4,
        kv_heads,
        on_device(np.full(2, wanted, np.int32)),
        SCALING,
        on_device(lengths),
        on_device(np.zeros((0, 2), np.int32)),
        None,
        found,
        reads,
    )
    for item, count in enumerate(found.counts.tolist()):
        query, group = divmod(item, kv_heads)
        own = torch.tensor(scores[query, group * heads : (group + 1) * heads]).double()
        seen = -(-int(lengths[query]) // 4)
        shares = torch.softmax(own[:, :seen] * SCALING, 1).mean(0)
        best, chosen = shares.topk(wanted + 1)
        assert best[wanted - 1] > best[wanted] * (1 + 1e-5)
        keys = (4 * chosen[:wanted].sort().values[:, None] + torch.arange(4)).flatten()
        assert found.tokens[item, :count].tolist() == keys[keys < lengths[query]].tolist()


def test_a_score_far_above_those_of_later_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its power, relative to the largest of those, would be infinite."""
    monkeypatch.setattr(row_selection, "CHUNK", 128)
    scores = np.zeros((1, 2, 144), np.float32)
    scores[:, :, 3] = 1000
    lengths = np.array([140 * 4], np.int32)
    found, reads = lists_of(1, 1, 144 * 4), reads_of(1)
    one, nothing = np.ones(1, np.int32), np.zeros((0, 1), np.int32)
    arguments = (on_device(one), SCALING, on_device(lengths), on_device(nothing), None)
    list_pages(on_device(scores), 4, 1, *arguments, found, reads)
    assert found.tokens[0, : int(found.counts)].tolist() == [12, 13, 14, 15]


@pytest.mark.parametrize("bits", [0x7FFFFFFF, 0x7FC00000, 0xFFFFFFFF])
@pytest.mark.parametrize("number", [2, 3, 5, 32])
@pytest.mark.parametrize("heads", [1, 2])
def test_whatever_a_model_computes_a_list_ends(bits: int, number: int, heads: int) -> None:
    """NaNs of any kind: what a GPU's arithmetic gives has all bits set, and ranks as it may."""
    scores = np.random.default_rng(number).standard_normal((1, heads, 32)).astype(np.float32)
    scores[:, :, :number] = np.array(bits, np.uint32).view(np.float32)
    found, reads = lists_of(1, 1, 512), reads_of(1)
    ones = torch.ones(1, dtype=torch.int32, device=DEVICE)
    ranges = torch.empty(0, 1, dtype=torch.int32, device=DEVICE)
    for wanted in (1, 3):
        list_pages(
            on_device(scores), 16, 1, wanted * ones, 1.0, 500 * ones, ranges, None, found, reads
        )
        (count,) = found.counts.tolist()
        assert count <= 16 * wanted


@settings(deadline=None, max_examples=25)
@given(
    length=st.integers(0, 70),
    page_size=st.sampled_from([1, 3, 4, 8]),
    begins=st.tuples(st.integers(-3, 75), st.integers(-3, 75)),
    sizes=st.tuples(st.integers(0, 30), st.integers(0, 80)),
    wanted=st.integers(-1, 80),
    seed=st.integers(0, 5),
)
def test_any_ranges(length: int, page_size: int, begins, sizes, wanted: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    scores = random.integers(0, 4, (1, 2, 72 // page_size + 1)).astype(np.float32)
    (first, other), (size, other_size) = begins, sizes
    ranges = np.array([[first], [first + size], [other], [other + other_size]])
    check(scores, page_size, 1, np.array([wanted]), np.array([length], np.int32), ranges)


def test_what_does_not_fit_is_refused() -> None:
    scores = torch.zeros(1, 2, 32, device=DEVICE)
    ones = torch.ones(1, dtype=torch.int32, device=DEVICE)
    reads = torch.zeros(1, 3, dtype=torch.int64, device=DEVICE)
    arguments = (scores, 16, 2, ones, 1.0, ones)
    many = torch.zeros(6, 1, dtype=torch.int32, device=DEVICE)
    with pytest.raises(ValueError, match="3 ranges"):
        list_pages(*arguments, many, None, lists_of(1, 2, 512), reads)
    for lists in (
        lists_of(1, 1, 512),
        lists_of(1, 2, 256),
        DeviceLists.of(1, 2, 1, 512, True, DEVICE),
    ):
        with pytest.raises(ValueError, match="cannot hold"):
            list_pages(*arguments, many[:2], None, lists, reads)
