"""Kernels run on the GPU where there is one, and else on the CPU in Triton's interpreter."""

from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("triton")

from tests.plugin.triton import interpreter

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

if DEVICE == "cpu":
    interpreter.import_kernels()


@pytest.fixture(scope="package", autouse=True)
def _interpreter() -> Iterator[None]:
    if DEVICE == "cuda":
        yield
        return
    with interpreter.interpreted():
        yield


@pytest.fixture(scope="session")
def device() -> str:
    return DEVICE
