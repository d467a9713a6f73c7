"""Small decode steps with every kernel, compared with the reference: to run under a checking tool.

compute-sanitizer --tool memcheck python -m benchmarks.gpu.small_cases memcheck --output FOLDER
"""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.command import run_stage
from benchmarks.gpu.device_step import DeviceStep, relative_error
from benchmarks.gpu.sparse_configs import TOKENS_10, Maskers, sink_and_window, sparse_cases
from vllm_sparse_plugin.paged.layout import BlockShape
from vllm_sparse_plugin.paged.triton_kernels import row_selection

logger = logging.getLogger(__name__)
TOOLS = ("plain", "memcheck", "racecheck")
_KEYS = 300
_MANY_KEYS = row_selection.MOST_NUMBERS + 100
"""So many scores are selected from by several programs, not by one."""


def small_cases(folder: Path, kv_heads: int, head_size: int) -> dict[str, tuple[Maskers, int]]:
    """Masker lists by name, and the keys that they are applied to.

    Args:
        folder: For files of maskers.
        kv_heads: Of the layer.
        head_size: Of the layer.
    """
    cases = {
        case.name: (case.maskers, _KEYS)
        for case in sparse_cases(_KEYS, folder, kv_heads, head_size)
    }
    fixed = sink_and_window(_KEYS)
    sample = {"type": "random_sampling", "sampling_rate": 0.1, "seed": 3}
    oracle = {"type": "oracle_top_k", "heavy_size": 0.05}
    cases["random sample"] = ([*fixed, sample], _KEYS)
    cases["oracle top-p"] = ([*fixed, {"type": "oracle_top_p", "top_p": 0.7}], _KEYS)
    buckets = {"type": "magic_pig", "lsh_l": 12, "lsh_k": 4}
    cases["MagicPIG"] = ([*fixed, buckets], _KEYS)
    cases["oracle top-k of many, and a sample"] = ([*fixed, oracle, sample], _MANY_KEYS)
    of_groups = {**oracle, "head_granularity": "kv_head"}
    cases["oracle top-k of many, per KV head"] = ([*fixed, of_groups], _MANY_KEYS)
    of_many = sparse_cases(_MANY_KEYS, folder, kv_heads, head_size)
    labels = next(case.maskers for case in of_many if case.name == TOKENS_10)
    cases["Double Sparsity of many"] = (labels, _MANY_KEYS)
    return cases


def measure(device: torch.device, only: int | None = None) -> dict[str, Any]:
    """Runs and compares all of them.

    Args:
        device: Of the kernels.
        only: So many of them; None: all.
    """
    is_gpu = device.type == "cuda"
    shape = (
        BlockShape(16, 8, 2, 64, torch.bfloat16)
        if is_gpu
        else BlockShape(16, 4, 2, 16, torch.float32)
    )
    tolerance = 0.03 if is_gpu else 1e-4
    records: list[dict[str, Any]] = []
    failures: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        cases = small_cases(Path(name), shape.num_kv_heads, shape.head_size)
        for case, (maskers, keys) in list(cases.items())[:only]:
            step = DeviceStep.of(maskers, shape, 2 if keys < _MANY_KEYS else 1, keys, 1, device)
            error = relative_error(step)
            records.append({"name": case, "keys": keys, "relative_error": error})
            logger.info("%s, %d keys: relative error %.5f", case, keys, error)
            if not error < tolerance:
                failures.append(f"{case}, {keys} keys: its output is off by {error:.4f}")
    return {"records": records, "failures": failures}


@torch.inference_mode()
def stage(device: str, is_quick: bool, variant: str) -> dict[str, Any]:
    """The stage's result; see `command.run_stage`."""
    return measure(torch.device(device), only=2 if device == "cpu" else 4 if is_quick else None)


if __name__ == "__main__":
    run_stage("small", __doc__ or "", stage, TOOLS)
