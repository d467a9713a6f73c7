"""Overlapping launches are compared with others; the switch that keeps launches apart."""

from functools import partial
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")

import triton

from benchmarks.gpu.overlapped_launches import differing_replays
from vllm_sparse_plugin.paged.triton_kernels import grids


def test_replays_that_differ_are_counted() -> None:
    """One launch that is right when it runs alone, and wrong in every third replay."""
    output, runs = torch.zeros(4), iter(range(-1, 100))

    def launch() -> None:
        run = next(runs)
        output.copy_(torch.arange(4.0) + (run >= 0 and run % 3 == 0))

    assert differing_replays([launch], output, replays=9) == 3
    assert differing_replays([partial(output.fill_, 2.0)], output, replays=9) == 0


def test_a_launch_that_writes_nothing_differs() -> None:
    output = torch.zeros(4)
    assert differing_replays([lambda: None], output, replays=2) == 2


@pytest.mark.parametrize(
    ("capability", "switch", "expected"),
    [((9, 0), None, True), ((10, 0), "1", True), ((9, 0), "0", False), ((8, 9), None, False)],
)
def test_where_launches_overlap(
    capability: tuple[int, int],
    switch: str | None,
    expected: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("SPARSE_ATTENTION_OVERLAP_LAUNCHES", raising=False)
    if switch is not None:
        monkeypatch.setenv("SPARSE_ATTENTION_OVERLAP_LAUNCHES", switch)
    with (
        mock.patch.object(grids, "await_launches", mock.Mock(spec=triton.JITFunction)),
        mock.patch.object(torch.cuda, "get_device_capability", return_value=capability),
    ):
        assert grids.can_overlap.__wrapped__(torch.device("cuda")) is expected
        assert not grids.can_overlap.__wrapped__(torch.device("cpu"))
