"""From how many keys on maskers are worth their cost on this machine.

A decode step's attention costs `a + b * keys`, dense with a small `a` and a large `b`, sparse the
other way round. Both lines are laid through two measured lengths; where they cross, sparse begins.
The answer is kept in the user's cache folder: a server's start should not measure twice.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from sparse_attention_hub.sparse_attention.research_attention import ResearchAttentionConfig
from sparse_attention_hub.sparse_attention.serialization import config_to_json
from vllm_sparse_plugin.paged.attention import PagedAttention, QueryBatch, attend_dense
from vllm_sparse_plugin.paged.layout import BlockLayout, BlockShape, LayerCache
from vllm_sparse_plugin.paged.maskers.base import Unsupported

logger = logging.getLogger(__name__)

_LENGTHS = (512, 8192)
_REPETITIONS = 7
_NEVER = 1 << 30
"""More keys than any model takes."""
_VERSION = 1
"""Of the kernels: raised when what was measured before no longer holds."""


def break_even_of(config: ResearchAttentionConfig, shape: BlockShape) -> int:
    """Keys that a query must see for maskers to cost less than dense attention.

    Args:
        config: The maskers; the list of most layers decides.
        shape: Of a layer's cache.

    Returns:
        0 when the general path serves them: whoever asks for such maskers wants to see them run.
    """
    try:
        attention = PagedAttention(config.masker_configs, shape)
    except Unsupported:
        return 0
    file = _cache_file(config, shape)
    if file.exists():
        known: int = json.loads(file.read_text())["keys"]
        return known
    keys = _measured(attention, shape)
    logger.info("sparse attention: from %d keys on, maskers cost less than dense attention", keys)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_suffix(f".{os.getpid()}")
        unfinished.write_text(json.dumps({"keys": keys}))
        unfinished.replace(file)
    except OSError as error:
        logger.warning("sparse attention: cannot keep the measured break-even: %s", error)
    return keys


def _cache_file(config: ResearchAttentionConfig, shape: BlockShape) -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    text = f"{_VERSION} {config_to_json(config)} {shape} {platform.node()} {_threads()}"
    name = hashlib.sha256(text.encode()).hexdigest()[:16]
    return folder / "vllm_sparse_plugin" / f"break_even_{name}.json"


def _threads() -> int:
    return int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)


def crossing(dense: tuple[float, float], sparse: tuple[float, float]) -> int:
    """Where two lines cross.

    Args:
        dense: Seconds at `_LENGTHS`.
        sparse: Likewise.

    Returns:
        Keys from which on `sparse` is below; 0 when always, `_NEVER` when never.
    """
    span = _LENGTHS[1] - _LENGTHS[0]
    slopes = [(costs[1] - costs[0]) / span for costs in (dense, sparse)]
    ahead = sparse[0] - dense[0]  # at the shorter length
    gain = slopes[0] - slopes[1]
    if gain <= 0:
        return _NEVER if ahead > 0 else 0
    return max(0, math.ceil(_LENGTHS[0] + ahead / gain))


def _measured(attention: PagedAttention, shape: BlockShape) -> int:
    indices = tuple(dict.fromkeys(i for masker in attention.maskers for i in masker.indices))
    layout = BlockLayout(shape, indices)
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, shape.num_heads, shape.head_size, generator=generator).numpy()
    dense, sparse = [], []
    for length in _LENGTHS:
        num_blocks = -(-length // shape.block_size)
        width = layout.bytes_per_token // shape.dtype.itemsize
        kv_cache = torch.zeros(
            num_blocks, shape.num_kv_heads, shape.block_size, width, dtype=shape.dtype
        )
        cache = LayerCache.of(kv_cache, layout, 0)
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
