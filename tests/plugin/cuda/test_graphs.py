"""The graphs of the GPU that is not there: what they record, fix and refuse."""

import os
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.experimental.gluon  # the first launch would import it, while kernels are interpreted
import triton.language as tl
from triton.runtime import interpreter

from tests.plugin.cuda import graphs, interpreted_launches, memory
from tests.plugin.cuda.device_mode import CUSTOM_OPS, CaptureError, DeviceMode
from tests.plugin.cuda.graphs import DryGraph, capture
from tests.plugin.triton.interpreter import interpreted

with mock.patch.dict(os.environ, {"TRITON_INTERPRET": "1"}):

    @triton.jit
    def _add_number_kernel(values, result, number, BLOCK: tl.constexpr):
        at = tl.arange(0, BLOCK)
        tl.store(result + at, tl.load(values + at) + number)


@pytest.fixture(autouse=True)
def _device() -> Iterator[None]:
    with DeviceMode():
        yield


@pytest.fixture
def numbers() -> torch.Tensor:
    """0 to 3 on the device, [4]."""
    return torch.arange(4.0, device="cuda")


def _captured(function: Callable[[], Any]) -> tuple[DryGraph, Any]:
    graph = DryGraph()
    with capture(graph):
        result = function()
    return graph, result


def _values(tensor: torch.Tensor) -> list[float]:
    values: list[float] = tensor.cpu().tolist()
    return values


def test_a_replay_computes_with_the_new_input(numbers: torch.Tensor) -> None:
    graph, result = _captured(lambda: (numbers + 1) * 2)
    numbers.fill_(10)
    assert _values(result) == [2, 4, 6, 8]
    graph.replay()
    assert _values(result) == [22] * 4
    numbers.zero_()
    graph.replay()
    assert _values(result) == [2] * 4


def test_what_the_host_knew_is_fixed(numbers: torch.Tensor) -> None:
    host = {"factor": 2.0}

    def branch() -> torch.Tensor:
        return numbers * host["factor"] if host["factor"] > 1 else numbers - 100

    graph, result = _captured(branch)
    host["factor"] = 0.5
    numbers.fill_(3)
    graph.replay()
    assert _values(result) == [6] * 4


def test_a_scalar_tensor_of_the_host_is_fixed(numbers: torch.Tensor) -> None:
    scalar = torch.tensor(2.0)
    graph, result = _captured(lambda: numbers * scalar)
    scalar.fill_(100)
    graph.replay()
    assert _values(result) == [0, 2, 4, 6]


def test_views_and_writes_in_place(numbers: torch.Tensor) -> None:
    target = torch.zeros(2, 2, device="cuda")

    def write() -> None:
        target.view(4)[1:3] = numbers[:2] + 1
        target[0, 0] = 7
        target[1].add_(target[0])

    graph, _ = _captured(write)
    target.zero_()
    numbers.fill_(4)
    graph.replay()
    assert _values(target.view(4)) == [7, 5, 5 + 7, 5]


def test_metadata_is_that_of_the_capture(numbers: torch.Tensor) -> None:
    square = numbers.clone().view(2, 2)
    graph, result = _captured(lambda: square.t_() @ torch.ones(2, 1, device="cuda"))
    for _ in range(2):
        graph.replay()
        assert _values(result.view(2)) == [2, 4]


def test_factories_run_again(numbers: torch.Tensor) -> None:
    def fill() -> torch.Tensor:
        return torch.zeros(4, device="cuda").add_(numbers)

    graph, result = _captured(fill)
    graph.replay()
    assert _values(result) == [0, 1, 2, 3]


def test_nothing_of_the_host_runs_again(numbers: torch.Tensor) -> None:
    host = torch.zeros(4)
    graph, _ = _captured(lambda: (host.add_(1), numbers.add_(1)))
    graph.replay()
    assert host.tolist() == [1] * 4
    assert _values(numbers) == [2, 3, 4, 5]
    assert graph.steps is not None
    assert len(graph.steps) == 1


def test_pinned_memory_is_read_by_the_replay() -> None:
    host = torch.zeros(4, pin_memory=True)
    graph, result = _captured(lambda: host.to("cuda", non_blocking=True) + 1)
    host.fill_(5)
    assert _values(result) == [1] * 4
    graph.replay()
    assert _values(result) == [6] * 4


def test_the_host_sees_through_its_view() -> None:
    host = torch.zeros(4, pin_memory=True)
    view = memory.view_of_host(host)
    assert view.device == torch.device("cuda:0")
    graph, _ = _captured(lambda: view.add_(1))
    graph.replay()
    assert host.tolist() == [2] * 4


def test_memory_of_a_capture_lives(numbers: torch.Tensor) -> None:
    target = torch.zeros(4, device="cuda")
    graph, _ = _captured(lambda: target.copy_(torch.cumsum(numbers * 1, 0).exp().log()))
    blocks = [torch.full((4,), 99.0) for _ in range(64)]
    graph.replay()
    assert _values(target) == pytest.approx([0, 1, 3, 6], abs=1e-5)
    assert all(block.tolist() == [99] * 4 for block in blocks)


def test_a_custom_op_is_recorded_by_what_it_does(numbers: torch.Tensor) -> None:
    runs = []

    def implementation(values: torch.Tensor, result: torch.Tensor) -> None:
        runs.append(values.device.type)
        result.copy_(values * len(runs))

    library = torch.library.Library("dry_test", "FRAGMENT")
    library.define("scale(Tensor values, Tensor(a!) result) -> ()")
    library.impl("scale", implementation, "CPU")
    result = torch.zeros(4, device="cuda")
    with mock.patch.dict(CUSTOM_OPS, {"dry_test::scale": implementation}):
        graph, _ = _captured(lambda: torch.ops.dry_test.scale(numbers, result))
    numbers.fill_(5)
    graph.replay()
    assert runs == ["cuda"]
    assert _values(result) == [5] * 4


def test_kernel_launches(numbers: torch.Tensor) -> None:
    result = torch.zeros(4, device="cuda")
    host = {"number": 10}

    def start() -> torch.Tensor:
        _add_number_kernel[(1,)](numbers, result, host["number"], BLOCK=4)
        return result * 2

    launcher = interpreted_launches.launcher(graphs.launch)
    with interpreted(), mock.patch.object(interpreter.GridExecutor, "__call__", launcher):
        graph, doubled = _captured(start)
        assert graph.steps is not None
        assert len(graph.steps) == 2
        host["number"] = 20
        numbers.fill_(1)
        graph.replay()
        with pytest.raises(ValueError, match="values cannot be accessed"):
            _add_number_kernel[(1,)](torch.zeros(4), result, 1, BLOCK=4)
    assert _values(doubled) == [22] * 4


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x[0].item(),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: bool(x.sum() > 0),
        lambda x: float(x[1]),
        lambda x: int(x[1]),
        lambda x: [0, 1, 2][x[1].long()],
        lambda x: x.nonzero(),
        lambda x: x[x > 1],
        lambda x: torch.masked_select(x, x > 1),
        lambda x: torch.unique(x),
        lambda x: torch.equal(x, x),
        lambda x: x.repeat_interleave(x.long()),
        lambda x: x.copy_(torch.ones(4)),
        lambda x: torch.ones(4).copy_(x),
        lambda x: torch.ones(4).to("cuda"),
        lambda x: torch.ones(4).cuda(non_blocking=True),
        lambda x: torch.ones(4, pin_memory=True).to("cuda"),
        lambda x: torch.tensor([1.0, 2.0], device="cuda"),
        lambda x: x[torch.tensor([0, 1])],
        lambda x: DryGraph().capture_begin(),
    ],
)
def test_refused_in_a_capture(function: Callable[[torch.Tensor], Any], numbers: Any) -> None:
    with pytest.raises(CaptureError):
        _captured(lambda: function(numbers))
    # And the next capture is none the worse for it.
    graph, result = _captured(lambda: numbers + 1)
    graph.replay()
    assert _values(result) == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch.where(x > 1, x, 0.0),
        lambda x: x.masked_fill_(x > 1, 0.0),
        lambda x: x.__setitem__(x > 1, 0.0),
        lambda x: x.repeat_interleave(2),
        lambda x: x[torch.arange(2, device="cuda")],
        lambda x: torch.full((2,), 3.0, device="cuda"),
        lambda x: x.to(torch.int32),
        lambda x: x.to("cuda"),
    ],
)
def test_allowed_in_a_capture(function: Callable[[torch.Tensor], Any], numbers: Any) -> None:
    graph, _ = _captured(lambda: function(numbers))
    graph.replay()


def test_devices_do_not_mix(numbers: torch.Tensor) -> None:
    with pytest.raises(RuntimeError, match="same device"):
        _captured(lambda: numbers + torch.ones(4))
    with pytest.raises(TypeError, match="numpy"):
        numbers.numpy()


def test_copies_are_copies(numbers: torch.Tensor) -> None:
    """Although both sides are the same memory."""
    host = torch.zeros(4)
    there, back = host.to("cuda"), numbers.cpu()
    host.fill_(1)
    numbers.fill_(1)
    assert _values(there) == [0] * 4
    assert back.tolist() == [0, 1, 2, 3]
    assert numbers.to("cuda:0") is numbers
    assert (there.device.type, back.device.type) == ("cuda", "cpu")
    assert torch.empty_like(there).is_cuda
    assert not torch.empty_like(there, device="cpu").is_cuda
    with torch.device("cuda"):
        assert torch.ones(1).is_cuda


def test_counts(numbers: torch.Tensor) -> None:
    captured, replayed = DryGraph.captured, DryGraph.replayed
    graph, _ = _captured(lambda: numbers + 1)
    graph.replay()
    graph.replay()
    assert (DryGraph.captured, DryGraph.replayed) == (captured + 1, replayed + 2)
    with pytest.raises(RuntimeError, match="preceding successful capture"):
        DryGraph().replay()
