"""Scores of pages as matrix products: queries of any size, ties, and how tiles are shared."""

import pytest
import torch

from tests.plugin.paged.paged_rows import make_rows, shape_of
from tests.plugin.triton.paged_caches import UNWRITTEN
from tests.plugin.triton.row_order import for_device
from tests.plugin.triton.test_page_bounds import scored
from vllm_sparse_plugin.paged.layout import BlockLayout
from vllm_sparse_plugin.paged.page_bounds import STORED_BITS, PageBounds, stored_bounds
from vllm_sparse_plugin.paged.triton_kernels import page_scores, tiles

_HALF_ULP = 2.0**-24
_LOST = 2.0**-33
"""Of a query's largest channel: what the others may be off by, see `page_products`."""


def all_scores(query: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """Quest's rule on bounds `[pages, channels]`, in float64; coarse lows may be above highs."""
    query = query.double()
    return query.clamp(min=0) @ high.double().T + query.clamp(max=0) @ low.double().T


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bits", STORED_BITS)
@pytest.mark.parametrize("spread", [1, 12, 40])
def test_channels_and_heads_of_any_size(bits: int, dtype: torch.dtype, spread: int) -> None:
    """Queries whose channels differ by many powers of 2, and heads by others; one is zero."""
    if dtype == torch.float16:
        spread = min(spread, 12)
    index = PageBounds(4, bits)
    layout = BlockLayout(shape_of(6, 1, 32, 16, dtype), (index,))
    rows = make_rows(layout, (64,), exact=False)
    generator = torch.Generator().manual_seed(7)
    powers = torch.randint(-spread, 1, (1, 6, 32), generator=generator)
    of_head = torch.tensor([0, 3, -spread, 2, 0, -3])[None, :, None]
    rows.query *= torch.exp2((powers + of_head).float()).to(dtype)
    rows.query[:, 4] = 0
    found = scored(rows, index, for_device(rows.kv_cache, layout.shape), dtype)[0, :, :16]
    low, high = (
        bound[rows.batch.block_table[0, :4], 0].flatten(0, 1)
        for bound in stored_bounds(index, rows.cache)
    )
    query = rows.query[0].float()
    terms = torch.maximum(low.abs(), high.abs())
    if bits < 16:
        # What codes count from, and the steps to each.
        terms = 3 * terms.amax(1, keepdim=True).expand_as(terms)
    sizes = query.double().abs() @ terms.double().T
    allowed = 2 * 33 * _HALF_ULP * sizes
    allowed += _LOST * query.double().abs().amax(1, keepdim=True) * terms.double().sum(1)
    assert ((found - all_scores(query, low, high)).abs() <= allowed).all()
    assert (found[4] == 0).all()


@pytest.mark.parametrize("bits", [4, 16])
@pytest.mark.parametrize("enough", [1, 4, 512])
def test_scores_do_not_depend_on_who_computes_them(
    bits: int, enough: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor on the batch: a row alone, and one of several, by few programs and by many."""
    monkeypatch.setattr(tiles, "TILE_NUMBERS", 512)  # tiles of 16 pages
    index = PageBounds(4, bits)
    layout = BlockLayout(shape_of(4, 2, 16, 16, torch.float16), (index,))
    lengths = (0, 641, 3, 64, 255, 384)
    rows = make_rows(layout, lengths, exact=False)
    kv_cache = for_device(rows.kv_cache, layout.shape)
    wanted = scored(rows, index, kv_cache, torch.float16)
    monkeypatch.setattr(page_scores, "ENOUGH_PROGRAMS", enough)
    for programs in (1, 40, 1000):
        monkeypatch.setattr(tiles, "PROGRAMS", programs)
        assert torch.equal(scored(rows, index, kv_cache, torch.float16), wanted)
    for row, length in enumerate(lengths):
        batch = rows.batch
        rows.batch = type(batch)(batch.block_table[row:], batch.rows[:1], batch.lengths[row:][:1])
        query, rows.query = rows.query, rows.query[row : row + 1]
        pages = -(-length // 4)
        assert torch.equal(
            scored(rows, index, kv_cache, torch.float16)[0, :, :pages], wanted[row, :, :pages]
        )
        assert (wanted[row, :, pages:] == UNWRITTEN).all()
        rows.batch, rows.query = batch, query


@pytest.mark.parametrize("bits", STORED_BITS)
def test_equal_pages_have_equal_scores(bits: int) -> None:
    """Wherever they are in a tile, so that the lower one of them is selected."""
    index = PageBounds(4, bits)
    layout = BlockLayout(shape_of(4, 1, 64, 16), (index,))
    rows = make_rows(layout, (320,), exact=False)
    records = rows.cache.stored(index)
    records[:] = records[:1]  # each block has the first one's pages
    kv_cache = for_device(rows.kv_cache, layout.shape)
    found = scored(rows, index, kv_cache)[0, :, :80].view(4, 20, 4)
    assert torch.equal(found, found[:, :1].expand_as(found))


def test_what_no_query_sees_is_not_loaded() -> None:
    """A row of padding may have any block; so may what lies behind a row's blocks."""
    index = PageBounds(16, 8)
    layout = BlockLayout(shape_of(2, 1, 16, 16), (index,))
    rows = make_rows(layout, (0, 33), exact=False)
    rows.batch.block_table[0] = 1 << 30
    rows.batch.block_table[1, 3:] = 1 << 30
    found = scored(rows, index, for_device(rows.kv_cache, layout.shape))
    assert (found[0] == UNWRITTEN).all()
    assert torch.isfinite(found[1, :, :3]).all()
