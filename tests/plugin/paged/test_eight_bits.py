"""Caches of 8 bits: what is stored, and that every masker sees the same keys as elsewhere."""

from pathlib import Path

import numpy as np
import pytest
import torch
from numba import njit
from vllm.platforms import current_platform

from tests.hub.top_k_maskers import HEAD_SIZE
from tests.plugin.paged.label_rows import assert_same_keys, rebuilt
from tests.plugin.paged.masker_lists import NAMES, masker_list
from tests.plugin.paged.paged_rows import (
    attend,
    general,
    make_rows,
    paged_attention,
    shape_of,
)
from tests.tolerances import ATTENTION_ATOL
from vllm_sparse_plugin.paged.attention import attend_dense
from vllm_sparse_plugin.paged.cache_scales import CacheScales
from vllm_sparse_plugin.paged.kernels.page_bounds import encode_bounds
from vllm_sparse_plugin.paged.kernels.rows import E4M3, load_row
from vllm_sparse_plugin.paged.kernels.vectors import LANES, load_part, store
from vllm_sparse_plugin.paged.layout import BlockLayout, stored_as
from vllm_sparse_plugin.paged.prefill import attend_prefills
from vllm_sparse_plugin.step_plan import DenseRow

current_platform.import_kernels()

DTYPE = torch.float8_e4m3fn
# Powers of 2, with which reference and kernels round alike; and others.
EXACT, OTHER = CacheScales(0.5, 0.25), CacheScales(0.3, 0.07)
NUMBERS = [byte for byte in range(256) if byte & 0x7F != 0x7F]  # the others are not numbers


@njit
def _load_row(row: np.ndarray, buffer: np.ndarray) -> np.ndarray:
    return load_row(row, 0, buffer, E4M3)


@njit
def _load_vectors(row: np.ndarray, numbers: np.ndarray) -> None:
    for i in range(0, len(row), LANES):
        store(numbers, i, load_part(row, i, E4M3, len(row) - i))


def test_kernels_read_every_number() -> None:
    stored = torch.tensor(NUMBERS, dtype=torch.uint8)
    expected = stored.view(DTYPE).float().numpy()
    row, buffer = stored.numpy(), np.empty(len(stored), np.float32)
    assert np.array_equal(load_row(row, 0, buffer, E4M3), expected)
    assert np.array_equal(_load_row(row, buffer), expected)
    numbers = np.full(LANES * 16, np.nan, np.float32)
    _load_vectors(row, numbers)
    assert np.array_equal(numbers[: len(row)], expected)


def test_bounds_are_stored_as_the_keys_are() -> None:
    stored = torch.tensor(NUMBERS, dtype=torch.uint8)
    bounds = stored.view(DTYPE).float().numpy().reshape(2, -1)
    record = np.zeros(len(stored), np.uint8)
    encode_bounds(bounds, 16, E4M3, record)
    assert record.tolist() == NUMBERS


def test_what_is_stored_is_the_nearest_number() -> None:
    numbers = torch.tensor(NUMBERS, dtype=torch.uint8).view(DTYPE).double()
    given = torch.cat([torch.linspace(-460, 460, 3001), torch.linspace(-0.1, 0.1, 1001)])
    for scale in (1.0, 0.25, 3.0):
        found = stored_as(given * scale, DTYPE, scale).double()
        nearest = (given.double()[:, None] - numbers).abs().min(dim=1).values
        # (float32s that lie in the middle of two numbers may have been rounded to it)
        assert ((given.double() - found).abs() <= nearest + 1e-4).all()
    far = torch.tensor([1e30, -1e30, 449.0, 464.0, torch.inf, -torch.inf])
    assert stored_as(far, DTYPE, 1.0).float().tolist() == [448, -448, 448, 448, 448, -448]
    half = torch.ones(3, dtype=torch.bfloat16)
    assert stored_as(half, torch.bfloat16, 5.0) is half


@pytest.mark.parametrize("scales", [EXACT, OTHER], ids=str)
def test_dense(scales: CacheScales) -> None:
    rows = make_rows(BlockLayout(shape_of(6, 2, 32, dtype=DTYPE)), exact=False, scales=scales)
    sinks = torch.linspace(-2, 4, 6)
    found = attend_dense(
        rows.query.numpy(), rows.cache, rows.batch, 32**-0.5, sink_logits=sinks.numpy()
    )
    for row in range(len(found)):
        key, value = (
            t[0].double().repeat_interleave(3, 0) for t in (rows.keys[row], rows.values[row])
        )
        scores = torch.einsum("hd,hkd->hk", rows.query[row].double(), key) * 32**-0.5
        weights = torch.cat([scores, sinks[:, None].double()], dim=1).softmax(dim=-1)[:, :-1]
        expected = torch.einsum("hk,hkd->hd", weights, value)
        difference = (torch.from_numpy(found[row]).double() - expected).abs().max()
        assert difference <= ATTENTION_ATOL[torch.float32]


@pytest.mark.parametrize("name", NAMES)
def test_every_masker_reads_the_same_keys(name: str, tmp_path: Path) -> None:
    maskers = masker_list(name, tmp_path, heads=4)
    shape = {"heads": 4, "kv_heads": 2, "head_size": HEAD_SIZE, "dtype": DTYPE}
    assert_same_keys(maskers, scales=EXACT, **shape)


@pytest.mark.parametrize("name", NAMES)
def test_with_any_scale(name: str, tmp_path: Path) -> None:
    """Of numbers that are rounded: few rows are near ties."""
    maskers = masker_list(name, tmp_path, heads=4)
    attention, layout = paged_attention(maskers, shape_of(4, 2, HEAD_SIZE, dtype=DTYPE))
    rows = make_rows(layout, exact=False, layer_index=1, scales=OTHER)
    output, _ = attend(attention, rows)
    expected, _ = general(maskers, rows)
    far = (output - expected).abs().amax(dim=(1, 2)) > ATTENTION_ATOL[torch.float32]
    assert far.sum() <= 1


@pytest.mark.parametrize("name", NAMES)
def test_an_index_does_not_depend_on_how_keys_came(name: str, tmp_path: Path) -> None:
    attention, layout = paged_attention(
        masker_list(name, tmp_path, heads=4), shape_of(4, 2, HEAD_SIZE, dtype=DTYPE)
    )
    rows = make_rows(layout, layer_index=1, scales=EXACT)
    output, read = attend(attention, rows)
    rows.cache = rebuilt(rows)
    again, read_again = attend(attention, rows)
    assert torch.equal(output, again)
    assert read.keys.tolist() == read_again.keys.tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scales", [EXACT, OTHER], ids=str)
def test_prefill_is_the_same_in_one_piece_and_in_several(dtype, scales: CacheScales) -> None:
    rows = make_rows(
        BlockLayout(shape_of(6, 2, 32, dtype=DTYPE)), (97,), exact=False, scales=scales
    )
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(97, 6, 32, generator=generator).to(dtype)
    table = torch.from_numpy(rows.batch.block_table)
    # What is not stored so: rows that begin in this step read their keys from the cache too.
    other = torch.full((97, 2, 32), torch.nan, dtype=dtype)
    whole, parts = torch.empty_like(query), torch.empty_like(query)
    for output, ends in ((whole, (97,)), (parts, (31, 64, 97))):
        for begin, end in zip((0, *ends), ends, strict=False):
            row = DenseRow(0, begin, end, end)
            attend_prefills(
                [row], query, (other, other), rows.cache, table, 32**-0.5, "vec", output
            )
    key, value = (t[0].repeat_interleave(3, 0).double() for t in (rows.keys[0], rows.values[0]))
    scores = torch.einsum("qhd,hkd->hqk", query.double(), key) * 32**-0.5
    scores.masked_fill_(torch.ones(97, 97).triu(1).bool(), -torch.inf)
    expected = torch.einsum("hqk,hkd->qhd", scores.softmax(dim=-1), value)
    for output in (whole, parts):
        assert (output.double() - expected).abs().max() <= ATTENTION_ATOL[dtype]
