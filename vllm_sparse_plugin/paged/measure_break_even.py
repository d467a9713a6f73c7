"""Measures `break_even`: reads what to measure from standard input, writes a number of keys.

A decode step's attention costs `a + b * keys`, dense with a small `a` and a large `b`, sparse the
other way round. Both lines are laid through two measured lengths; where they cross, sparse begins.
"""

from __future__ import annotations

import functools
import importlib
import json
import math
import statistics
import sys
import time
from collections.abc import Callable

import torch

from sparse_attention_hub.sparse_attention.serialization import config_from_json
from vllm_sparse_plugin.paged.attention import PagedAttention, attend_dense
from vllm_sparse_plugin.paged.break_even import NEVER
from vllm_sparse_plugin.paged.layout import BlockLayout, BlockShape
from vllm_sparse_plugin.paged.maskers.base import Unsupported
from vllm_sparse_plugin.paged.random_row import random_row
from vllm_sparse_plugin.paged.warm_up import first_layer

LENGTHS = (512, 8192)
_REPETITIONS = 7


def crossing(dense: tuple[float, float], sparse: tuple[float, float]) -> int:
    """Where two lines cross.

    Args:
        dense: Seconds at `LENGTHS`.
        sparse: Likewise.

    Returns:
        Keys from which on `sparse` is below; 0 when always, `NEVER` when never.
    """
    span = LENGTHS[1] - LENGTHS[0]
    slopes = [(costs[1] - costs[0]) / span for costs in (dense, sparse)]
    ahead = sparse[0] - dense[0]  # at the shorter length
    gain = slopes[0] - slopes[1]
    if gain <= 0:
        return NEVER if ahead > 0 else 0
    return max(0, math.ceil(LENGTHS[0] + ahead / gain))


def measured(attention: PagedAttention, shape: BlockShape, layer: int) -> int:
    """The break-even of some maskers.

    Args:
        attention: The maskers.
        shape: Of a layer's cache.
        layer: One that has these maskers.
    """
    indices = tuple(dict.fromkeys(i for masker in attention.maskers for i in masker.indices))
    layout = BlockLayout(shape, indices)
    dense, sparse = [], []
    for length in LENGTHS:
        row = random_row(layout, length, layer)
        inputs = (row.query, row.cache, row.batch, 0.1)
        dense.append(_seconds(functools.partial(attend_dense, *inputs)))
        sparse.append(_seconds(functools.partial(attention.attend, *inputs)))
    return crossing((dense[0], dense[1]), (sparse[0], sparse[1]))


def _seconds(run: Callable[[], object]) -> float:
    """Median of some runs, after one that compiles and warms up."""
    run()
    times = []
    for _ in range(_REPETITIONS):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def main() -> None:
    """Writes 0 when the general path serves the maskers."""
    given = json.load(sys.stdin)
    shape = BlockShape(
        given["block_size"],
        given["num_heads"],
        given["num_kv_heads"],
        given["head_size"],
        getattr(torch, given["dtype"]),
    )
    for name in given["imports"]:  # maskers of the server's own
        importlib.import_module(name)
    config = config_from_json(given["config"])
    try:
        attention = PagedAttention(config.masker_configs, shape)
    except Unsupported:
        keys = 0
    else:
        keys = measured(attention, shape, first_layer(config))
    sys.stdout.write(f"{keys}\n")


if __name__ == "__main__":
    main()
