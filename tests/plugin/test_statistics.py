"""Counting what was read."""

import pytest

from vllm_sparse_plugin import statistics
from vllm_sparse_plugin.endpoint import merge_reports
from vllm_sparse_plugin.statistics import ReadCount, Statistics


def test_counts_add_up_per_tag_and_in_total() -> None:
    counts = Statistics()
    counts.add_queries("a", sparse=1, dense=10, automatic=4, fallback=2)
    counts.add_keys("a", read=5, visible=20)
    counts.add_keys("a", read=5, visible=20)
    counts.add_queries(None, sparse=1, dense=0)
    counts.add_keys(None, read=10, visible=10)
    counts.add("a", ReadCount(read_bytes=7, visible_bytes=9, general_rows=1))
    assert counts.report("a") == {
        "sparse_queries": 1,
        "dense_queries": 10,
        "automatic_dense_queries": 4,
        "fallback_queries": 2,
        "read_keys": 10,
        "visible_keys": 40,
        "read_bytes": 7,
        "visible_bytes": 9,
        "general_rows": 1,
        "density": 0.25,
    }
    assert counts.report()["density"] == 0.4
    assert counts.report("b") is None


def test_density_of_a_dense_request_is_one() -> None:
    counts = Statistics()
    counts.add_queries("a", sparse=0, dense=10)
    assert counts.report("a")["density"] == 1.0


def test_oldest_tag_is_forgotten(monkeypatch) -> None:
    monkeypatch.setattr(statistics, "MAX_TAGS", 2)
    counts = Statistics()
    for tag in ("a", "b", "c"):
        counts.add_queries(tag, sparse=1, dense=0)
    assert counts.report("a") is None
    assert counts.report("b") is not None
    assert counts.report("c") is not None


def test_workers_hold_different_heads_of_the_same_queries() -> None:
    one, two = Statistics(), Statistics()
    for counts, read in ((one, 3), (two, 5)):
        counts.add_queries("a", sparse=1, dense=2)
        counts.add_keys("a", read=read, visible=8)
        counts.add("a", ReadCount(read_bytes=read, visible_bytes=9, general_rows=1))
    assert merge_reports([one.report("a"), two.report("a")]) == {
        "sparse_queries": 1,
        "dense_queries": 2,
        "automatic_dense_queries": 0,
        "fallback_queries": 0,
        "read_keys": 8,
        "visible_keys": 16,
        "read_bytes": 8,
        "visible_bytes": 18,
        "general_rows": 1,
        "density": 0.5,
    }
    assert merge_reports([one.report("a"), None]) is None


def test_groups_settle_their_own_steps() -> None:
    """One group's plan is made while another's layers have not run yet."""

    class Step:
        read = 0

        def settle(self, statistics: Statistics) -> None:
            statistics.add_keys(None, self.read, 10)

    counts, first, second = Statistics(), Step(), Step()
    counts.pending[1] = [first]
    counts.settle(2)
    counts.pending[2] = [second]
    first.read, second.read = 3, 4  # the layers run
    counts.settle(1)
    assert counts.totals.read_keys == 3
    assert counts.report()["read_keys"] == 7
    assert counts.report()["read_keys"] == 7


def test_counts_that_cannot_be_had_now_are_had_later() -> None:
    class Step:
        is_there = False

        def settle(self, statistics: Statistics) -> None:
            if not self.is_there:
                raise RuntimeError("asleep")
            statistics.add_keys(None, 1, 10)

    counts, steps = Statistics(), [Step(), Step()]
    counts.pending[1] = list(steps)
    steps[0].is_there = True
    with pytest.raises(RuntimeError, match="asleep"):
        counts.report()
    assert counts.totals.read_keys == 1
    steps[1].is_there = True
    assert counts.report()["read_keys"] == 2
    assert not counts.pending
