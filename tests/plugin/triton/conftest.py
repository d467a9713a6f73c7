"""Kernels run on the GPU where there is one, and else on the CPU in Triton's interpreter."""

from collections.abc import Iterator

import numpy as np
import pytest

pytest.importorskip("triton")

from tests.plugin.triton.interpreter import DEVICE, interpreted


@pytest.fixture(scope="package", autouse=True)
def _interpreter() -> Iterator[None]:
    if DEVICE == "cuda":
        yield
        return
    with interpreted():
        yield


@pytest.fixture(autouse=True)
def _no_warnings_of_unused_numbers() -> Iterator[None]:
    """Whole blocks are loaded, and what was never written overflows; nothing of it is stored."""
    with np.errstate(all="ignore"):
        yield


@pytest.fixture(scope="session")
def device() -> str:
    return DEVICE
