"""What a CUDA graph asks of launchers: they launch, and do nothing else."""

from typing import Any

import pytest
import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter

from tests.plugin.triton.all_launches import launches
from tests.plugin.triton.interpreter import DEVICE

ALLOWED = {"aten::zero_", "aten::slice.Tensor", "aten::view.dtype", "aten::detach"}
"""Views of memory, and making histograms ready."""


class Recorder(TorchDispatchMode):
    """Names of the operations that torch carries out."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def recorded(monkeypatch: pytest.MonkeyPatch, by_head: bool, is_split: bool):
    """By launcher: torch's operations, and grids."""
    kind = triton.JITFunction if DEVICE == "cuda" else interpreter.InterpretedFunction
    grids: list[tuple[int, ...]] = []
    monkeypatch.setattr(kind, "run", lambda self, *args, grid, **named: grids.append(grid))
    results = {}
    for name, launch in launches(4, 128, torch.bfloat16, by_head, is_split).items():
        grids.clear()
        with Recorder() as recorder:
            launch()
        results[name] = (recorder.names, list(grids))
    return results


@pytest.mark.parametrize("by_head", [False, True])
@pytest.mark.parametrize("is_split", [False, True])
def test_no_memory_is_asked_for_and_no_value_is_looked_at(monkeypatch, by_head, is_split) -> None:
    """On tensors without memory, a look at a value would fail, and memory would be recorded."""
    for name, (operations, grids) in recorded(monkeypatch, by_head, is_split).items():
        assert grids, name
        assert set(operations) <= ALLOWED, name
        for grid in grids:
            assert all(isinstance(size, int) and 0 < size < 1 << 16 for size in grid), name
    with Recorder() as recorder:
        torch.empty(3, device=DEVICE)
    assert recorder.names == ["aten::empty.memory_format"]  # the recorder does see memory
