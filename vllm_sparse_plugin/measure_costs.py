"""Measures, when a worker starts on CUDA, what attention of decode steps costs: see `cost_model`.

It is done after vLLM has made the caches and before it captures graphs: blocks are empty then, and
what memory steps take has been counted. Each step runs in all layers of a KV cache group, one after
the other, through the layers' own `forward`: so kernels, metadata and caches are those of serving,
and no layer finds its keys in the device's cache. Keys are random; maskers that read more or less
depending on them (top-p, samples with a bounded error) are measured at what those make them read.
"""

from __future__ import annotations

import functools
import logging
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import torch
from vllm.config import VllmConfig

from vllm_sparse_plugin import compat
from vllm_sparse_plugin.dummy_steps import LayerGroup, decode_batch, layers_of
from vllm_sparse_plugin.paged.device.cost_model import (
    NEVER,
    AttentionCosts,
    CostModel,
    Point,
    StepCosts,
)
from vllm_sparse_plugin.paged.device.sequences import Change
from vllm_sparse_plugin.paged.device.step import DeviceStep
from vllm_sparse_plugin.row_table import row_table

if TYPE_CHECKING:
    from vllm_sparse_plugin.device_metadata import DeviceMetadataBuilder

logger = logging.getLogger(__name__)

ROWS = (1, 8, 64)
LONGEST = 32_768
MOST_KEYS = 1 << 18
"""Of a step, all rows together: they are written into every layer first."""
_REPETITIONS = 5
_REPORTED_ROWS = (1, 4, 16, 64)


@dataclass(frozen=True)
class AttentionStep:
    """What is measured.

    Attributes:
        rows: Requests that decode.
        keys: That they see, all together.
        is_sparse: Whether all of them attend sparsely.
        launch: Launches all layers, the same each time.
    """

    rows: int
    keys: int
    is_sparse: bool
    launch: Callable[[], None]


class Clock(Protocol):
    """Measures steps."""

    def seconds(self, step: AttentionStep, in_graph: bool) -> float:
        """Of one run, in which nothing is compiled any more.

        Args:
            step: What to run.
            in_graph: Whether a CUDA graph of it is measured instead of the host's launches.
        """


class DeviceClock:
    """By CUDA events."""

    def seconds(self, step: AttentionStep, in_graph: bool) -> float:
        """See `Clock`: the median of some runs."""
        run = step.launch
        run()
        if in_graph:
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step.launch()
            run = graph.replay
        run()
        times = []
        for _ in range(_REPETITIONS):
            torch.cuda.synchronize()
            begin, end = (
                torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
                for _ in range(2)
            )
            begin.record()
            run()
            end.record()
            end.synchronize()
            times.append(1e-3 * float(begin.elapsed_time(end)))
        return statistics.median(times)


def places(max_rows: int, max_keys: int, available: int) -> list[tuple[int, int]]:
    """Rows and keys of each at which to measure: from few to many of both, as far as there are.

    Args:
        max_rows: Requests that decode in a step.
        max_keys: Keys that a query may see.
        available: Keys that a cache holds, at least `max_rows`.

    Returns:
        Each once.
    """
    longest = min(LONGEST, max_keys)
    most = min(MOST_KEYS, available)
    return sorted(
        {
            (rows, max(1, min(keys, most // rows)))
            for rows in {min(rows, max_rows) for rows in ROWS}
            for keys in (longest // 32, longest // 4, longest)
        }
    )


def measure_engine(vllm_config: VllmConfig, clock: Clock | None = None) -> None:
    """Measures an engine's steps, for the rows that are automatic, and keeps it in its `RowTable`.

    All ranks of a tensor parallel group call it, and get what the first of them has measured: they
    must decide alike. It does nothing where no row can be automatic, and where a layer takes the
    general path: whoever asks for such maskers wants to see them run.

    Args:
        vllm_config: Of the engine, whose caches are there and empty.
        clock: Of the device; None: by CUDA events.
    """
    config, table = compat.serving_config(vllm_config), row_table(vllm_config)
    builders = [builder for builder in table.builders.values() if builder.is_captured]
    if config is None or not config.is_automatic or table.graphs.is_always_dense:
        return
    if table.graphs.config_json is None or not builders:
        logger.warning(
            'sparse attention: "min_sparse_keys" is "auto", but some layers take the general path '
            "or share keys: what steps cost is not measured, and no step makes requests dense"
        )
        return
    logger.info("sparse attention: measuring what dense and sparse decode steps cost")
    started = time.perf_counter()
    has_graphs = vllm_config.compilation_config.cudagraph_mode.has_full_cudagraphs()
    with torch.inference_mode():
        found = [_of_group(vllm_config, builder, has_graphs, clock) for builder in builders]
    torch.cuda.empty_cache()  # what the graphs had
    costs: StepCosts = compat.of_first_rank(functools.reduce(StepCosts.__add__, found))
    table.costs = costs
    took = time.perf_counter() - started
    logger.info("sparse attention: %s (measured in %.1f s)", report(costs), took)


def report(costs: StepCosts) -> str:
    """What was found, in words.

    Args:
        costs: Of an engine.
    """
    return "; ".join(
        f"{name} take {_formula(own.dense)} dense and {_formula(own.sparse)} sparse: maskers pay "
        + ", ".join(_pays(own, rows) for rows in _REPORTED_ROWS)
        for name, own in (("graphs", costs.replayed), ("steps without a graph", costs.launched))
        if own is not None
    )


def _formula(model: CostModel) -> str:
    return (
        f"{1e6 * model.constant:.0f} us + {1e6 * model.per_row:.2f} us per request + "
        f"{1e9 * model.per_key:.3f} ns per key (measured: {model.low:.2f} to {model.high:.2f} "
        "times that)"
    )


def _pays(costs: AttentionCosts, rows: int) -> str:
    keys = costs.break_even(rows)
    return f"at batch {rows} " + ("never" if keys == NEVER else f"from {keys} keys on")


def _of_group(
    vllm_config: VllmConfig,
    builder: DeviceMetadataBuilder,
    has_graphs: bool,
    clock: Clock | None,
) -> StepCosts:
    layers = layers_of(vllm_config, builder)
    scheduler, longest = vllm_config.scheduler_config, vllm_config.model_config.max_model_len
    num_blocks, _, block_size, _ = layers[0].kv_cache.shape
    available = (num_blocks - 1) * block_size
    chosen = places(scheduler.max_num_seqs, longest, available)
    chosen = [(rows, keys) for rows, keys in chosen if rows * -(-keys // block_size) < num_blocks]
    used = max(rows * -(-keys // block_size) for rows, keys in chosen)
    group = LayerGroup.of(layers, max(rows for rows, _ in chosen), vllm_config.model_config.dtype)
    group.fill(used, scheduler.max_num_batched_tokens)
    clock = clock or DeviceClock()
    try:
        return StepCosts(
            launched=_costs(builder, group, chosen, None, clock),
            replayed=_costs(builder, group, chosen, longest, clock) if has_graphs else None,
        )
    finally:
        builder.forget_reads()
        group.empty(used)


def _costs(
    builder: DeviceMetadataBuilder,
    group: LayerGroup,
    chosen: list[tuple[int, int]],
    longest: int | None,
    clock: Clock,
) -> AttentionCosts:
    """Both formulas, of steps in graphs if `longest` is given: keys that any of them may see."""
    points: tuple[list[Point], list[Point]] = ([], [])
    for rows, keys in chosen:
        common = decode_batch(rows, keys, longest or keys, group.layers[0].kv_cache)
        steps = builder.build_measured(common)
        if any(own.sequences is not None for own in steps[1].groups):
            group.attend(_with_codes(steps[1], keys), rows)
        for is_sparse, metadata in enumerate(steps):
            launch = functools.partial(group.attend, metadata, rows)
            step = AttentionStep(rows, rows * keys, bool(is_sparse), launch)
            took = clock.seconds(step, in_graph=longest is not None)
            points[is_sparse].append(Point(step.rows, step.keys, took))
    dense, sparse = map(CostModel.fit, points)
    return AttentionCosts(dense, sparse)


def _with_codes(step: DeviceStep, keys: int) -> DeviceStep:
    """The same step, in which keys get the codes of what was learned: of nothing, at place 0.

    Args:
        step: Of sequences of one length.
        keys: Their length.
    """
    groups = []
    for group in step.groups:
        sequences = group.sequences
        if sequences is not None:
            numbers = range(len(group.batch.lengths))
            changes = tuple(Change(number, 0, keys, prefix=0) for number in numbers)
            sequences = replace(sequences, changes=changes)
        groups.append(replace(group, sequences=sequences))
    return replace(step, groups=tuple(groups))
