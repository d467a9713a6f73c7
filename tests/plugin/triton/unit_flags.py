"""What tests of selection share: flags with poison behind them, and the ways of a selection."""

import numpy as np
import pytest

from tests.plugin.triton.interpreter import DEVICE
from vllm_sparse_plugin.paged.triton_kernels.radix_workspace import RadixWorkspace

POISON = 77
IN_CHUNKS = RadixWorkspace.of(DEVICE, max_rows=1, parts=1)
ONE_PROGRAM = RadixWorkspace.of(DEVICE, max_rows=1, parts=1, long_row=1 << 30, short_row=0)
SPLIT = RadixWorkspace.of(DEVICE, max_rows=64, parts=3, long_row=1, short_row=0)
WAYS = (IN_CHUNKS, ONE_PROGRAM, SPLIT)
WORKSPACES = pytest.mark.parametrize("workspace", WAYS[1:], ids=["one", "split"])


def poisoned(flags: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The same flags, but for what lies past the lengths."""
    units = len(flags) // len(lengths)
    result = flags.copy()
    for row, values in enumerate(result):
        values[lengths[row // units] :] = POISON
    return result
