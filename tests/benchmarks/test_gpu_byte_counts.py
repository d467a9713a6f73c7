"""What kernels have to move, counted by hand."""

import pytest
import torch

from benchmarks.gpu.byte_counts import (
    Heads,
    ceiling,
    gather_bytes,
    index_share,
    page_scan_bytes,
)
from benchmarks.gpu.kernel_bandwidth import Sizes, random_lists
from benchmarks.gpu.timing import summary
from vllm_sparse_plugin.paged.page_bounds import PageBounds

HEADS = Heads(query_heads=32, kv_heads=8, head_size=128, element_bytes=2)


def test_of_a_token() -> None:
    assert HEADS.key_value_bytes == 512
    assert HEADS.query_bytes == 8192


def test_a_gather_counts_lists_and_what_they_name() -> None:
    assert gather_bytes(HEADS, 8, 1000) == 1000 * 516 + 8 * 16384


def test_a_scan_counts_records_and_scores() -> None:
    record = PageBounds(16, 4).record_bytes(Sizes().shape)
    assert record == 16 + 128
    pages = 32768 // 16
    expected = 8 * (pages * (8 * 144 + 32 * 4) + 8192)
    assert page_scan_bytes(HEADS, 8, 32768, 16, record) == expected


def test_ceilings() -> None:
    share = index_share(144, 16, 512)
    assert share == pytest.approx(0.0176, abs=1e-4)
    assert ceiling(1, 0.05, share) == pytest.approx(1 / (0.05 + share))
    assert ceiling(0, 0.05, share) == 1
    assert ceiling(0.7, 0.1, share) == pytest.approx(1 / (0.3 + 0.7 * (0.1 + share)))


@pytest.mark.parametrize("run", [1, 16])
def test_lists_are_runs_that_begin_at_multiples(run: int) -> None:
    sizes = Sizes(batch=2, keys=256, kv_heads=2)
    tokens, counts = random_lists(sizes, 0.25, run, "cpu")
    assert counts.tolist() == [64] * 4
    for row in tokens[:, :64]:
        assert (row.diff() > 0).all()
        assert (row.view(-1, run)[:, 0] % run == 0).all()
        assert torch.equal(
            row.view(-1, run) - row.view(-1, run)[:, :1], torch.arange(run).expand(64 // run, run)
        )
    assert len({tuple(row.tolist()) for row in tokens}) == 4


def test_median_and_quartiles() -> None:
    timing = summary([1.0, 2.0, 3.0, 4.0, 100.0], "a clock")
    assert (timing.low, timing.microseconds, timing.high, timing.runs) == (2, 3, 4, 5)
    assert summary([7.0], "a clock").high == 7
