"""Attention of one decode step of a layer, sparse and dense, at batch 8.

    python -m benchmarks.gpu.attention_step --output FOLDER [--quick]

Sparse: everything from the query to the output, for as many layers as fit (at most four), one
after the other; what the host plans once per step is measured by itself, and counted as a model of
32 layers shares it. Dense: the fastest of what vLLM has, see `dense_baselines`. Neither writes the
cache. Each sparse list is compared with the reference's own masker objects before it is measured,
and launches that overlap with launches that do not.
Queries and keys are random: query heads of a group select different pages then, unlike those of a
trained model, so that lists of single query heads are longer here.
"""

from __future__ import annotations

import logging
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import byte_counts
from benchmarks.gpu.cells import EVERY, HEAD_SIZE, KV_HEADS, LAYERS, QUERY_HEADS
from benchmarks.gpu.command import run_stage
from benchmarks.gpu.dense_baselines import PLAIN, DenseCase, measure_dense
from benchmarks.gpu.device_step import DeviceStep, relative_error
from benchmarks.gpu.kernel_times import kernel_microseconds
from benchmarks.gpu.overlapped_launches import REPLAYS, differing_replays
from benchmarks.gpu.sparse_configs import MOST_LAYERS, SparseCase, quest, sparse_cases
from benchmarks.gpu.timing import Stopwatch, host_microseconds, stopwatch
from vllm_sparse_plugin.paged.layout import BlockShape
from vllm_sparse_plugin.paged.triton_kernels.grids import launches_apart

logger = logging.getLogger(__name__)

ENGINE_DENSE = "FLASH_ATTN"
"""The dense backend of the engines that are compared."""


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        shape: Of the layer.
        batch: Sequences.
        keys: Of each, by turns.
        checked_keys: Of each, where results are compared with the reference's.
        tolerance: Of the comparison, see `relative_error`.
        replays: In which overlapping launches are compared with others.
        grid: Keys and sequences at which a dense and a sparse step are measured: for the ceilings
            of engines, and to see from how many keys on maskers pay.
    """

    shape: BlockShape
    batch: int
    keys: tuple[int, ...]
    checked_keys: int
    tolerance: float
    replays: int
    grid: tuple[tuple[int, int], ...]


FULL = Plan(
    BlockShape(16, QUERY_HEADS, KV_HEADS, HEAD_SIZE, torch.bfloat16),
    8,
    (32768, 131072),
    17000,  # selected from by the kernels that are measured: shorter rows have others
    0.03,  # a page or key whose scores tie may be another
    REPLAYS,
    tuple((cell.keys, cell.requests) for cell in EVERY),
)
TINY = Plan(BlockShape(16, 4, 2, 16, torch.float32), 2, (128,), 100, 0.01, 2, ((64, 1),))
"""For dry runs."""


def layers_that_fit(bytes_per_layer: int, device: torch.device | str) -> int:
    """Layers for whose caches a third of the free memory is enough, at least one."""
    if torch.device(device).type != "cuda":
        return 1
    free, _ = torch.cuda.mem_get_info(device)
    return max(1, min(MOST_LAYERS, free // 3 // bytes_per_layer))


def measure(
    plan: Plan, device: torch.device | str, watch: Stopwatch, only: int | None = None
) -> dict[str, Any]:
    """Everything.

    Args:
        plan: What.
        device: Of the kernels.
        watch: Of the device.
        only: Of the sparse lists, so many; None: all.
    """
    failures: list[str] = []
    contexts = [_of_context(plan, keys, device, watch, only, failures) for keys in plan.keys]
    grid = [_of_grid(plan, *place, device, watch, failures) for place in plan.grid]
    return {"contexts": contexts, "dense_grid": grid, "failures": failures}


def _of_grid(
    plan: Plan,
    keys: int,
    count: int,
    device: torch.device | str,
    watch: Stopwatch,
    failures: list[str],
) -> dict[str, Any]:
    """The engines' dense kernel and Quest at 10 %, one layer, at any number of keys."""
    case = DenseCase.of(plan.shape, count, keys, device)
    name = ENGINE_DENSE if torch.device(device).type == "cuda" else PLAIN
    found = measure_dense(case, watch, names=(name,))
    record: dict[str, Any] = {"keys": keys, "requests": count, "left_out": found.left_out}
    if name in found.times:
        record |= found.times[name].to_dict()
    try:
        step = DeviceStep.of(quest(keys, 0.1), plan.shape, count, keys, 1, case.query.device)
        timing = watch.time([partial(step.attend, 0)])
        record["sparse_microseconds"] = timing.microseconds
    except Exception as error:  # the dense times are needed anyhow
        logger.exception("%d keys, batch %d", keys, count)
        failures.append(f"{keys} keys, batch {count}: {type(error).__name__}: {error}"[:500])
    return record


def _of_context(
    plan: Plan,
    keys: int,
    device: torch.device | str,
    watch: Stopwatch,
    only: int | None,
    failures: list[str],
) -> dict[str, Any]:
    case = DenseCase.of(plan.shape, plan.batch, keys, device)
    layers = layers_that_fit(case.bytes_per_cache, device)
    dense = measure_dense(case, watch, layers)
    fastest = dense.times[dense.fastest].microseconds
    logger.info("%d keys, dense: %s takes %.1f us", keys, dense.fastest, fastest)
    records = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cases = sparse_cases(keys, folder, plan.shape.num_kv_heads, plan.shape.head_size)
        checked = sparse_cases(
            plan.checked_keys, folder, plan.shape.num_kv_heads, plan.shape.head_size
        )
        for sparse, small in list(zip(cases, checked, strict=True))[:only]:
            record: dict[str, Any] = {"name": sparse.name}
            try:
                record |= _of_list(plan, sparse, small, case, watch, layers)
                record["speed_up"] = fastest / record["microseconds"]
                logger.info("%d keys, %s: %.2f x", keys, sparse.name, record["speed_up"])
            except Exception as error:  # the other lists are measured anyhow
                logger.exception("%d keys, %s", keys, sparse.name)
                record["error"] = f"{type(error).__name__}: {error}"[:500]
                failures.append(f"{keys} keys, {sparse.name}: {record['error']}")
            records.append(record)
    return {
        "keys": keys,
        "batch": plan.batch,
        "layers": layers,
        "dense": {name: timing.to_dict() for name, timing in dense.times.items()},
        "left_out": dense.left_out,
        "fastest_dense": dense.fastest,
        "sparse": records,
    }


def _of_list(
    plan: Plan,
    sparse: SparseCase,
    small: SparseCase,
    dense: DenseCase,
    watch: Stopwatch,
    layers: int,
) -> dict[str, Any]:
    """One list of maskers: refused when it is wrong, else measured."""
    device = dense.query.device
    checked = DeviceStep.of(small.maskers, plan.shape, 2, plan.checked_keys, 1, device)
    error = relative_error(checked)
    if not error < plan.tolerance:
        raise AssertionError(f"its output is off by {error:.4f} (allowed: {plan.tolerance})")
    del checked
    step = DeviceStep.of(
        sparse.maskers, plan.shape, plan.batch, dense.sequences.keys, layers, device
    )
    launches = [partial(step.attend, layer) for layer in range(layers)]
    timing = watch.time(launches)
    with launches_apart():
        apart = watch.time(launches)
    differing = differing_replays(launches, step.output, plan.replays)
    if differing:
        raise AssertionError(
            f"{differing} of {plan.replays} replays differed from launches one after the other"
        )
    planned = host_microseconds(step.plan)
    total = timing.microseconds + planned / LAYERS
    (density, loaded), index = step.densities(), step.index_share
    return {
        **timing.to_dict(),
        "microseconds": total,
        "attend_microseconds": timing.microseconds,
        "plan_microseconds": planned,
        "apart_microseconds": apart.microseconds + planned / LAYERS,
        "error": None,
        "relative_error": error,
        "density": density,
        "nominal_density": sparse.density,
        "loaded": loaded,
        "index_share": index,
        "ceiling": byte_counts.ceiling(1.0, loaded, index),
        "kernels": kernel_microseconds(launches, device),
    }


@torch.inference_mode()
def stage(device: str, is_quick: bool, variant: str) -> dict[str, Any]:
    """The stage's result; see `command.run_stage`."""
    if device == "cpu":
        return measure(TINY, device, stopwatch(device), only=1)
    watch = stopwatch(device, 10 if is_quick else 50)
    return measure(FULL, device, watch, only=3 if is_quick else None)


if __name__ == "__main__":
    run_stage("attention", __doc__ or "", stage)
