"""Selection in long rows, which are worked on in parts, against sorting."""

import numpy as np
import pytest

from vllm_sparse_plugin.paged.kernels.selection import flag_largest


def expected_pages(scores, closed, count) -> list[int]:
    order = [page for page in np.argsort(-scores, kind="stable") if not closed[page]]
    return sorted(order[:count])


@pytest.mark.parametrize("levels", [7, 100_000])
@pytest.mark.parametrize("page_size", [1, 8])
@pytest.mark.parametrize(("heads", "units"), [(3, 3), (1, 2)])
def test_long_rows_in_parts(levels: int, page_size: int, heads: int, units: int) -> None:
    """Rows that are cut into parts, with many ties or few, where heads or groups have units."""
    random = np.random.default_rng(levels)
    pages = (50_000, 49_999, 3)
    lengths = np.array([page_size * count - (page_size > 1) for count in pages], np.int32)
    capacity = -(-int(lengths.max()) // 8) * 8
    scores = random.integers(0, levels, (3, heads, max(pages))).astype(np.float32)
    flags = (random.random((3 * units, capacity)) < 0.2).astype(np.uint8)
    flags[:, : page_size * 1000] = 1
    wanted = np.array([5000, 49_000, 2])
    before = flags.copy()
    flag_largest(scores.copy(), page_size, heads, wanted, 1.0, lengths, flags)
    for row, count in enumerate(pages):
        for selector in range(heads):
            share = units // heads
            own = slice(row * units + selector * share, row * units + (selector + 1) * share)
            seen = before[own, : lengths[row]]
            starts = np.arange(0, lengths[row], page_size)
            closed = np.minimum.reduceat(seen.min(axis=0), starts) > 0
            chosen = expected_pages(scores[row, selector, :count], closed, wanted[row])
            expected = before[own].copy()
            for page in chosen:
                expected[:, page * page_size : min((page + 1) * page_size, lengths[row])] = 1
            assert (flags[own] == expected).all()


def test_groups_pool_their_heads_shares() -> None:
    """Two groups of three heads: the mean of the heads' softmax, over rows of several tiles."""
    random = np.random.default_rng(0)
    lengths = np.array([9000, 77], np.int32)
    scores = random.standard_normal((2, 6, 9000)).astype(np.float32) * 5
    flags = np.zeros((4, 9000), np.uint8)
    wanted = np.array([900, 10])
    flag_largest(scores.copy(), 1, 2, wanted, 0.3, lengths, flags)
    for row, length in enumerate(lengths):
        logits = scores[row, :, :length].astype(np.float64) * 0.3
        shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        for group in range(2):
            pooled = shares[3 * group : 3 * group + 3].mean(axis=0)
            chosen = np.flatnonzero(flags[2 * row + group])
            assert len(chosen) == wanted[row]
            least = np.sort(pooled)[-wanted[row]]
            assert pooled[chosen].min() >= least * (1 - 1e-5)
