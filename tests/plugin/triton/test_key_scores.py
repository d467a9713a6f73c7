"""Exact scores: those of the numba kernel, of every key that a query sees."""

import pytest
import torch

from tests.plugin.paged.paged_rows import Rows, make_rows, shape_of
from tests.plugin.triton.interpreter import DEVICE
from tests.plugin.triton.paged_caches import (
    UNWRITTEN,
    Batch,
    assert_close_sums,
    edge_lengths,
    empty_scores,
    largest_products,
)
from tests.plugin.triton.row_order import for_device
from vllm_sparse_plugin.paged.kernels import key_scores as numba_kernels
from vllm_sparse_plugin.paged.layout import BlockLayout
from vllm_sparse_plugin.paged.triton_kernels import tiles
from vllm_sparse_plugin.paged.triton_kernels.key_scores import score_keys

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
SIZES = [
    (1, 1, 32, 16, F32),
    (4, 2, 64, 16, BF16),
    (6, 2, 80, 32, F16),
    (8, 2, 128, 16, BF16),
    (7, 1, 64, 48, F32),
    (8, 1, 80, 128, F16),
    (8, 8, 32, 16, F16),
]


def scores_of(rows: Rows, query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of Triton and of numba."""
    batch, shape = rows.batch, rows.cache.layout.shape
    expected = empty_scores(rows).cpu().numpy()
    numba_kernels.score_keys(
        rows.query.float().numpy(),
        rows.cache.elements,
        shape.kind,
        shape.block_size,
        batch.block_table,
        batch.rows,
        batch.lengths,
        expected,
    )
    found, on_device = empty_scores(rows), Batch.of(rows)
    kv_cache = for_device(rows.kv_cache, shape)
    table, lengths = on_device.block_table, on_device.lengths
    score_keys(query.to(DEVICE), kv_cache, table, on_device.rows, lengths, found)
    return found.cpu(), torch.from_numpy(expected)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_scores(sizes: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "PROGRAMS", 3)  # some rows have more tiles than programs
    monkeypatch.setattr(tiles, "TILE_NUMBERS", 2048)
    layout = BlockLayout(shape_of(*sizes))
    lengths = edge_lengths(layout.shape.block_size)
    rows = make_rows(layout, lengths, exact=False, spare_keys=3)
    found, expected = scores_of(rows, rows.query)
    written = expected != UNWRITTEN
    assert torch.equal(found != UNWRITTEN, written)
    most = torch.where(written, largest_products(rows), 0.0)
    assert_close_sums(found, expected, most, layout.shape.head_size)
    # A block table's order of blocks is all that says where keys are.
    for row, length in enumerate(lengths):
        keys = rows.keys[row][0, :, :length].double()
        keys = keys.repeat_interleave(sizes[0] // sizes[1], dim=0)
        exact = torch.einsum("htd,hd->ht", keys, rows.query[row].double())
        assert_close_sums(found[row, :, :length], exact, most[row, :, :length], sizes[2])


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_of_small_integers_the_scores_are_the_same(sizes: tuple) -> None:
    layout = BlockLayout(shape_of(*sizes))
    rows = make_rows(layout, edge_lengths(layout.shape.block_size))
    assert torch.equal(*scores_of(rows, rows.query))
    # Queries as a model has them: of half precision, and a part of a larger tensor.
    wide = torch.cat([rows.query, rows.query], dim=1)
    assert torch.equal(*scores_of(rows, wide[:, : sizes[0]]))
