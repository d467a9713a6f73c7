"""Vector loops against float64: every width of rows, every type, any number of heads and rows."""

import numpy as np
import pytest

from vllm_sparse_plugin.paged.kernels.rows import BFLOAT16, FLOAT16, FLOAT32
from vllm_sparse_plugin.paged.kernels.tile_products import (
    add_values,
    pad_queries,
    padded,
    score_tile,
)

ROWS = 40


def cache_of(head_size: int, kind: int) -> tuple[np.ndarray, np.ndarray]:
    """Elements `[1, 1, ROWS * head_size]` of a kind, and the numbers they stand for, float64."""
    numbers = np.random.default_rng(head_size).standard_normal(ROWS * head_size, np.float32)
    if kind == FLOAT32:
        elements = numbers
    elif kind == BFLOAT16:
        elements = (numbers.view(np.uint32) >> 16).astype(np.uint16)
        numbers = (elements.astype(np.uint32) << 16).view(np.float32)
    else:
        halves = numbers.astype(np.float16)
        elements, numbers = halves.view(np.uint16), halves.astype(np.float32)
    return elements[None, None], numbers.reshape(ROWS, head_size).astype(np.float64)


@pytest.mark.parametrize("kind", [FLOAT32, BFLOAT16, FLOAT16])
@pytest.mark.parametrize("head_size", [1, 8, 16, 24, 40, 64, 80, 128, 256])
@pytest.mark.parametrize("heads", [1, 3, 4, 7, 8])
def test_scores_and_sums(head_size: int, heads: int, kind: int) -> None:
    elements, numbers = cache_of(head_size, kind)
    generator = np.random.default_rng(1)
    query = generator.standard_normal((heads + 2, head_size)).astype(np.float32)
    rows = np.full((heads, padded(head_size)), np.nan, np.float32)
    pad_queries(query, 1, rows)
    # The last row of the cache is among them: nothing may be read or written beyond it.
    order = np.concatenate([[ROWS - 1], generator.permutation(ROWS - 1)]).astype(np.int64)
    for count in (1, 2, 13, ROWS):
        places = order[:count] * head_size
        scores = np.full((heads, ROWS + 2), np.nan, np.float32)
        score_tile(rows, elements, kind, places, count, head_size, scores, 1, places)
        wanted = query[1 : heads + 1].astype(np.float64) @ numbers[order[:count]].T
        # float32 sums of up to 256 products of order 1: about 2**-24 * 256 at the very most.
        np.testing.assert_allclose(scores[:, 1 : count + 1], wanted, rtol=0, atol=3e-5)
        assert np.isnan(scores[:, 0]).all()
        assert np.isnan(scores[:, count + 1 :]).all()
        sums = np.zeros((heads, padded(head_size)), np.float32)
        sums[:, :head_size] = 1
        factors = generator.random((heads, ROWS)).astype(np.float32)
        add_values(factors, elements, kind, places, count, head_size, sums, places)
        wanted = 1 + factors[:, :count].astype(np.float64) @ numbers[order[:count]]
        np.testing.assert_allclose(sums[:, :head_size], wanted, rtol=0, atol=3e-5)
        assert (sums[:, head_size:] == 0).all()


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    head_size, heads = 72, 5
    elements, _ = cache_of(head_size, FLOAT32)
    query = np.random.default_rng(2).standard_normal((heads, head_size)).astype(np.float32)
    rows = np.zeros((heads, padded(head_size)), np.float32)
    pad_queries(query, 0, rows)
    places = np.arange(ROWS, dtype=np.int64) * head_size
    together = np.empty((heads, ROWS), np.float32)
    score_tile(rows, elements, FLOAT32, places, ROWS, head_size, together, 0, places)
    alone = np.empty((heads, ROWS), np.float32)
    for i in range(ROWS):
        own = places[i : i + 1]
        score_tile(rows, elements, FLOAT32, own, 1, head_size, alone, i, own)
    assert (together == alone).all()
