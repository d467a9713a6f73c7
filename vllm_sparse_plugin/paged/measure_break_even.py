"""Measures `break_even`: reads what to measure from standard input, writes a number of keys.

A decode step's attention costs `a + b * keys`, dense with a small `a` and a large `b`, sparse the
other way round. Both lines are laid through two measured lengths; where they cross, sparse begins.
"""

from __future__ import annotations

import importlib
import json
import math
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
import torch

from sparse_attention_hub.sparse_attention.serialization import config_from_json
from vllm_sparse_plugin.paged.attention import PagedAttention, QueryBatch, attend_dense
from vllm_sparse_plugin.paged.break_even import NEVER
from vllm_sparse_plugin.paged.layout import BlockLayout, BlockShape, LayerCache
from vllm_sparse_plugin.paged.maskers.base import Unsupported
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
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, shape.num_heads, shape.head_size, generator=generator).numpy()
    dense, sparse = [], []
    for length in LENGTHS:
        num_blocks = -(-length // shape.block_size)
        width = layout.bytes_per_token // shape.dtype.itemsize
        kv_cache = torch.zeros(
            num_blocks, shape.num_kv_heads, shape.block_size, width, dtype=shape.dtype
        )
        cache = LayerCache.of(kv_cache, layout, layer)
        key = torch.randn(length, shape.num_kv_heads, shape.head_size, generator=generator)
        cache.write(key.to(shape.dtype), key.to(shape.dtype), torch.arange(length))
        batch = QueryBatch(
            np.arange(num_blocks, dtype=np.int32)[None],
            np.zeros(1, np.int32),
            np.full(1, length, np.int32),
        )
        dense.append(_seconds(lambda: attend_dense(query, cache, batch, 0.1)))  # noqa: B023
        sparse.append(_seconds(lambda: attention.attend(query, cache, batch, 0.1)))  # noqa: B023
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
