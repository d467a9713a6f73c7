"""Threads of tests that call many kernels on few keys."""

from collections.abc import Iterator

import numba
import pytest
import torch


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One for numba and one for torch: their threads wait for work busily, in each other's way."""
    before = numba.get_num_threads(), torch.get_num_threads()
    numba.set_num_threads(1)
    torch.set_num_threads(1)
    yield
    numba.set_num_threads(before[0])
    torch.set_num_threads(before[1])
