"""Numbers made of labels: the shares that scores give, and lists of the keys with the largest."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.plugin.paged.paged_rows import Rows, make_rows, shape_of
from tests.plugin.triton.interpreter import DEVICE
from tests.plugin.triton.lists_by_flags import lists_of, on_device, reads_of
from tests.plugin.triton.row_order import for_device
from tests.plugin.triton.test_channel_labels import (
    BF16,
    F16,
    F32,
    SCALING,
    Labels,
    compared,
    query_labels,
    scores_of,
)
from vllm_sparse_plugin.paged.layout import BlockLayout
from vllm_sparse_plugin.paged.triton_kernels import key_numbers
from vllm_sparse_plugin.paged.triton_kernels.key_lists import list_numbered
from vllm_sparse_plugin.paged.triton_kernels.key_numbers import KeyListsWorkspace, KeyRows
from vllm_sparse_plugin.paged.triton_kernels.label_numbers import can_number, number_labels
from vllm_sparse_plugin.paged.triton_kernels.label_scores import weigh_labels
from vllm_sparse_plugin.paged.triton_kernels.pooling import PoolingWorkspace

STEP, POISON = 64, -5

# Heads, KV heads, head size, block size, type; rows of labels, one channel in, bits
CASES = [
    ((4, 2, 64, 16, BF16), Labels(2, 8, 4)),
    ((8, 2, 128, 16, BF16), Labels(2, 16, 8)),
    ((7, 1, 64, 32, F16), Labels(1, 5, 2)),
    ((3, 1, 80, 48, F32), Labels(1, 16, 4)),
    ((4, 2, 32, 128, F32), Labels(2, 4, 16)),
    ((12, 1, 32, 16, F32), Labels(1, 7, 8)),
]


@pytest.fixture(autouse=True)
def _small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key_numbers, "_SCORES_AT_ONCE", 2 * STEP)


def check(rows: Rows, index: Labels, wanted: np.ndarray, ranges: np.ndarray) -> None:
    """Numbers against shares of the numba kernel's scores, lists against the numbers."""
    shape = rows.cache.layout.shape
    heads, kv_heads, lengths = shape.num_heads, shape.num_kv_heads, rows.batch.lengths
    kv_cache = for_device(rows.kv_cache, shape)
    labels, own = query_labels(rows, index)
    arguments = compared(rows, index, kv_cache, labels)
    queries, capacity = len(lengths), -(-int(lengths.max()) // 16) * 16 + 16
    weights = PoolingWorkspace.of(queries, heads, capacity, DEVICE)
    numbers = torch.full((queries, heads, capacity), POISON, dtype=torch.int32, device=DEVICE)
    key_rows = KeyRows(
        on_device(lengths),
        on_device(wanted.astype(np.int32)),
        on_device(ranges.astype(np.int32)),
        None,
        kv_heads,
        heads // kv_heads,
        KeyListsWorkspace.of(queries * kv_heads, DEVICE),
    )
    weigh_labels(*arguments, key_rows.lengths, SCALING, weights)
    number_labels(*arguments, key_rows, SCALING, weights, numbers.view(torch.float32))
    made = numbers[:, :: heads // kv_heads].cpu().numpy().astype(np.int64) % (1 << 32)
    scores = scores_of(rows, index, kv_cache, labels, own)[1].double() * SCALING
    lists, reads = lists_of(queries, kv_heads, capacity), reads_of(queries)
    list_numbered(numbers.view(torch.float32), key_rows, lists, reads)
    for query, length in enumerate(lengths.tolist()):
        shares = scores[query, :, :length].softmax(-1).unflatten(0, (kv_heads, -1)).mean(1)
        keys = np.arange(length)
        is_listed = np.zeros(length, bool)
        for begin, end in zip(ranges[::2, query], ranges[1::2, query], strict=True):
            is_listed |= (keys >= begin) & (keys < end)
        for kv_head in range(kv_heads):
            own_numbers = made[query, kv_head]
            assert (own_numbers[length:] == POISON % (1 << 32)).all()
            own_numbers = own_numbers[:length]
            assert ((own_numbers == 0) == is_listed).all()
            found = (own_numbers[~is_listed] - (1 << 31)).astype(np.int32).view(np.float32)
            # Exponents of some dozens, with the errors of a few float32 operations.
            expected = shares[kv_head].numpy()[~is_listed]
            np.testing.assert_allclose(found, expected, rtol=2e-4, atol=1e-30)
            order = np.lexsort((keys, -own_numbers))[: length - int(is_listed.sum())]
            right = np.union1d(order[: max(0, int(wanted[query]))], keys[is_listed])
            item = query * kv_heads + kv_head
            assert int(lists.counts[item]) == len(right)
            assert lists.tokens[item, : len(right)].sort()[0].tolist() == right.tolist()


@pytest.mark.parametrize(("sizes", "index"), CASES, ids=str)
def test_numbers_and_lists(sizes: tuple, index: Labels) -> None:
    """Edges of blocks, steps and parts; padding; ranges that cover all and nothing."""
    layout = BlockLayout(shape_of(*sizes), (index,))
    rows = make_rows(layout, (0, 1, 4 * STEP - 1, STEP * 16 + 1), exact=False, spare_keys=2)
    lengths = rows.batch.lengths
    check(rows, index, np.array([3, 2, 9, 200]), np.zeros((0, len(lengths)), np.int64))
    ranges = np.stack([lengths * 0, lengths * 0 + 20, lengths - 33, lengths])
    check(rows, index, np.array([3, 0, 9, 100]), ranges)


@settings(deadline=None, max_examples=15)
@given(
    length=st.integers(0, 150),
    begins=st.tuples(st.integers(-3, 150), st.integers(-3, 150)),
    sizes=st.tuples(st.integers(0, 30), st.integers(0, 160)),
    wanted=st.integers(-1, 160),
    bits=st.sampled_from([2, 4, 8, 16]),
    block_size=st.sampled_from([16, 32, 48]),
)
def test_any_ranges(length: int, begins, sizes, wanted: int, bits: int, block_size: int) -> None:
    index = Labels(1, 5, bits)
    layout = BlockLayout(shape_of(2, 1, 32, block_size, F32), (index,))
    rows = make_rows(layout, (length,), exact=False)
    (first, other), (size, other_size) = begins, sizes
    ranges = np.array([[first], [first + size], [other], [other + other_size]])
    check(rows, index, np.array([wanted]), ranges)


@pytest.mark.parametrize(
    ("index", "heads", "is_made"),
    [
        (Labels(2, 16, 4), 8, True),
        (Labels(8, 16, 4), 8, False),  # a row of labels for each query head
        (Labels(2, 4, 16), 8, False),  # 64 bytes of labels for each key, 32 of scores
        (Labels(2, 16, 4), 36, False),  # more heads than a program has registers for
    ],
    ids=str,
)
def test_when_labels_are_compared_twice(index: Labels, heads: int, is_made: bool) -> None:
    layout = BlockLayout(shape_of(heads, 2, 128, 16, BF16), (index,))
    rows = make_rows(layout, (1,), exact=False)
    labels, _ = query_labels(rows, index)
    _, keys, *_ = compared(rows, index, rows.kv_cache, labels)
    assert can_number(keys, heads // 2) == is_made
