"""Bounds of pages: the bytes that the numba kernels store, and the scores that they give."""

import functools
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.plugin.paged.paged_rows import Rows, make_rows, shape_of
from tests.plugin.paged.test_page_bounds import expected_bounds
from tests.plugin.triton.interpreter import DEVICE
from tests.plugin.triton.paged_caches import (
    UNWRITTEN,
    Batch,
    assert_close_sums,
    assert_same_bytes,
    empty_scores,
    written_again,
    written_in_steps,
)
from tests.plugin.triton.row_order import for_device, from_device
from vllm_sparse_plugin.paged.device.cache import DeviceCache
from vllm_sparse_plugin.paged.device.space import DeviceSpace
from vllm_sparse_plugin.paged.kernels import page_scores as numba_kernels
from vllm_sparse_plugin.paged.layout import BlockLayout, BlockShape, LayerCache
from vllm_sparse_plugin.paged.page_bounds import STORED_BITS, PageBounds
from vllm_sparse_plugin.paged.triton_kernels import tiles
from vllm_sparse_plugin.paged.triton_kernels.page_bounds import update_pages
from vllm_sparse_plugin.paged.triton_kernels.page_scores import score_pages
from vllm_sparse_plugin.paged.triton_kernels.writing import write_rows


@dataclass(frozen=True)
class Case:
    heads: int
    kv_heads: int
    head_size: int
    block_size: int
    page_size: int
    bits: int
    dtype: torch.dtype

    @property
    def shape(self) -> BlockShape:
        return shape_of(self.heads, self.kv_heads, self.head_size, self.block_size, self.dtype)

    @property
    def lengths(self) -> tuple[int, ...]:
        page, block = self.page_size, self.block_size
        if block > 32:  # seldom: the interpreter is slow
            return (1, 0, block + page - 1)
        return (0, 1, page - 1, page, block + 1, 2 * block - 1)


F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
CASES = [
    Case(1, 1, 32, 16, 16, 16, F32),
    Case(4, 2, 64, 16, 8, 16, BF16),
    Case(6, 2, 80, 32, 16, 16, F16),
    Case(8, 2, 128, 16, 16, 8, BF16),
    Case(7, 1, 64, 32, 8, 8, F16),
    Case(8, 1, 32, 128, 32, 8, F32),
    Case(2, 2, 80, 16, 16, 4, F32),
    Case(8, 2, 64, 128, 128, 4, BF16),
    Case(3, 1, 128, 32, 32, 4, F16),
    Case(2, 1, 80, 48, 24, 2, BF16),
    Case(14, 2, 32, 16, 16, 2, F16),
    Case(4, 1, 128, 32, 16, 2, F32),
    Case(16, 1, 96, 16, 16, 4, BF16),
    Case(5, 1, 256, 16, 8, 8, F16),
    Case(1, 1, 256, 16, 16, 16, F16),
    Case(2, 1, 20, 16, 4, 2, F32),
]


def update_all(layout: BlockLayout, kv_cache: torch.Tensor, slots: torch.Tensor) -> None:
    shape = layout.shape
    for index in layout.indices:
        assert isinstance(index, PageBounds)
        sizes = (index.record_bytes(shape), shape.head_size, index.page_size, index.label_bits)
        update_pages(kv_cache, layout.place_of(index), *sizes, slots)


def device_cache(layout: BlockLayout, kv_cache: torch.Tensor) -> DeviceCache:
    space = DeviceSpace(layout.shape, 1, 16, 64, torch.device(DEVICE))
    return DeviceCache.of(kv_cache, layout, 0, space)


def scored(
    rows: Rows, index: PageBounds, kv_cache: torch.Tensor, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """By the kernel, from queries of some type."""
    layout = rows.cache.layout
    scores, batch = empty_scores(rows, index.page_size), Batch.of(rows)
    score_pages(
        batch.query.to(dtype),
        kv_cache,
        layout.place_of(index),
        index.record_bytes(layout.shape),
        index.page_size,
        index.label_bits,
        batch.block_table,
        batch.rows,
        batch.lengths,
        scores,
    )
    return scores.cpu()


def scored_by_numba(rows: Rows, index: PageBounds) -> torch.Tensor:
    cache, batch = rows.cache, rows.batch
    shape = cache.layout.shape
    scores = empty_scores(rows, index.page_size).cpu().numpy()
    numba_kernels.score_pages(
        rows.query.float().numpy(),
        cache.elements,
        shape.kind,
        cache.records,
        cache.layout.place_of(index),
        index.record_bytes(shape),
        shape.block_size,
        index.page_size,
        index.label_bits,
        batch.block_table,
        batch.rows,
        batch.lengths,
        scores,
    )
    return torch.from_numpy(scores)


def added_size(bound: torch.Tensor, bits: int) -> torch.Tensor:
    """What a row's bounds are, or the smallest one and the steps to each, which are added."""
    least = bound.min()
    return bound.abs() if bits == 16 else least.abs() + (bound - least)


def reference(rows: Rows, index: PageBounds) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores from the keys themselves, float64, and the sums of their terms' sizes."""
    scores = empty_scores(rows, index.page_size).cpu().double()
    sizes = scores.abs()
    group = rows.query.shape[1] // rows.cache.layout.shape.num_kv_heads
    for row, length in enumerate(rows.batch.lengths.tolist()):
        for page, start in enumerate(range(0, length, index.page_size)):
            for head, keys in enumerate(rows.keys[row][0]):
                seen = keys[start : min(length, start + index.page_size)]
                low, high = (b.double() for b in expected_bounds(seen, index.label_bits))
                own = slice(head * group, (head + 1) * group)
                query = rows.query[row, own].double()
                # With few bits, a coarse low may even be above its high.
                scores[row, own, page] = torch.where(query > 0, query * high, query * low).sum(-1)
                # Either side's products are added, the one that is not taken as a zero.
                low, high = (added_size(bound, index.label_bits) for bound in (low, high))
                largest = torch.where(query > 0, query * high, query * low).abs()
                sizes[row, own, page] = largest.sum(-1)
    return scores, sizes


@pytest.mark.parametrize("case", CASES, ids=str)
def test_bytes_and_scores(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "PROGRAMS", 3)  # some rows have more tiles than programs
    monkeypatch.setattr(tiles, "TILE_NUMBERS", 512)
    index = PageBounds(case.page_size, case.bits)
    layout = BlockLayout(case.shape, (index,))
    rows = make_rows(layout, case.lengths, exact=False, spare_keys=2)
    kv_cache = written_again(rows, functools.partial(update_all, layout))
    assert_same_bytes(rows, kv_cache)
    # With the rows, in one launch.
    at_once = written_in_steps(
        rows, lambda kv_cache, *step: device_cache(layout, kv_cache).write(*step)
    )
    assert_same_bytes(rows, at_once)
    exact, sizes = reference(rows, index)
    assert_close_sums(scored_by_numba(rows, index), exact, sizes, case.head_size)
    # Queries are of the model's type, or of float32s that have as many digits, or more.
    for dtype in {torch.float32, case.dtype}:
        found = scored(rows, index, kv_cache, dtype)
        assert_close_sums(found, exact, sizes, case.head_size)
        assert torch.equal(found == UNWRITTEN, exact == UNWRITTEN)


@pytest.mark.parametrize("case", [case for case in CASES if case.bits == 16], ids=str)
def test_of_small_integers_the_scores_are_the_same(case: Case) -> None:
    index = PageBounds(case.page_size, 16)
    rows = make_rows(BlockLayout(case.shape, (index,)), case.lengths)
    kv_cache = for_device(rows.kv_cache, case.shape)
    for dtype in {torch.float32, case.dtype}:
        found = scored(rows, index, kv_cache, dtype)
        assert torch.equal(found, scored_by_numba(rows, index))


@settings(deadline=None, max_examples=8)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=2),
    spare_keys=st.integers(0, 20),
    group=st.integers(1, 8),
    bits=st.sampled_from(STORED_BITS),
    page_size=st.sampled_from([4, 8, 16]),
    seed=st.integers(0, 1000),
)
def test_no_key_of_a_page_scores_more(
    lengths: list[int], spare_keys: int, group: int, bits: int, page_size: int, seed: int
) -> None:
    """Bounds are bounds, of whatever a query sees; with fewer bits, up to half of a step."""
    index = PageBounds(page_size, bits)
    layout = BlockLayout(shape_of(2 * group, 2, 16, 16), (index,))
    rows = make_rows(layout, lengths, seed, exact=False, spare_keys=spare_keys)
    kv_cache = written_again(rows, functools.partial(update_all, layout), seed)
    assert_same_bytes(rows, kv_cache)
    found = scored(rows, index, kv_cache)
    assert_close_sums(found, *reference(rows, index), 16)
    for row, length in enumerate(lengths):
        keys = rows.keys[row][0, :, :length].double().repeat_interleave(group, dim=0)
        query = rows.query[row].double()
        scores = (keys @ query[:, :, None])[..., 0]
        for page, start in enumerate(range(0, length, page_size)):
            own = slice(start, min(length, start + page_size))
            slack = 1e-4
            if bits < 16:
                spread = (keys[:, own].amax((1, 2)) - keys[:, own].amin((1, 2))) / (2**bits - 1)
                slack = spread / 2 * query.abs().sum(-1) + 1e-4
            assert (scores[:, own].amax(-1) <= found[row, :, page] + slack).all()


@settings(deadline=None, max_examples=10)
@given(
    steps=st.lists(st.tuples(st.integers(0, 2), st.integers(1, 20), st.integers(0, 12))),
    seed=st.integers(0, 1000),
)
def test_after_any_history_of_writes(steps: list[tuple[int, int, int]], seed: int) -> None:
    """Sequences are written on, some from before their ends, as when tokens are rejected."""
    layout = BlockLayout(shape_of(2, 2, 8, 16), (PageBounds(8, 16), PageBounds(16, 4)))
    kv_cache = torch.full((12, 2, 16, layout.bytes_per_token // 4), torch.nan)
    cache, copy = LayerCache.of(kv_cache, layout, 0), for_device(kv_cache, layout.shape)
    at_once = copy.clone()
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randperm(12, generator=generator).reshape(3, 4)
    ends = [0, 0, 0]
    for sequence, count, back in steps:
        start = max(0, ends[sequence] - back)
        ends[sequence] = min(64, start + count)
        places = torch.arange(start, ends[sequence])
        slots = blocks[sequence][places // 16] * 16 + places % 16
        key, value = torch.randn(2, len(places), 2, 8, generator=generator)
        cache.write(key, value, slots)
        write_rows(key.to(DEVICE), value.to(DEVICE), copy, slots.to(DEVICE))
        update_all(layout, copy, slots.to(DEVICE))
        written = from_device(copy, layout.shape)
        assert torch.equal(written.view(torch.uint8), kv_cache.view(torch.uint8))
        device_cache(layout, at_once).write(key.to(DEVICE), value.to(DEVICE), slots.to(DEVICE))
        assert torch.equal(at_once.view(torch.uint8), copy.view(torch.uint8))
