"""The same engine with CUDA graphs and without: requests that come and go, sparse beside dense.

    python -m benchmarks.gpu.graph_against_eager --output FOLDER

More than 100 decode steps of at most eight requests, with batches of every size in between, so that
graphs are replayed with padding, and with other requests in a row than when they were captured.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.gpu.command import run_stage
from benchmarks.gpu.engine_answers import (
    GRAPHS,
    Answered,
    Asked,
    answers,
    compare,
    let_go,
    prepare_environment,
    small_engine,
)
from benchmarks.gpu.tiny_models import prompts, write_model
from benchmarks.gpu.token_configs import Maskers, token_configs

logger = logging.getLogger(__name__)
CONFIGS = ("Quest, per KV head", "vAttention over Quest", "Double Sparsity, per KV head")
TOLERANCE = 0.002
"""Of logprobs: a padded batch is multiplied by other kernels than one that is not."""
_SIZES = [1, 2, 4, 8]


def schedule(steps: int = 100) -> list[Asked]:
    """Requests that come every few steps and stay for different times.

    Args:
        steps: Of the longest answer, about.
    """
    lengths = [40, 700, 17, 333, 16, 129, 480, 64, 255, 90, 350, 31]
    found = []
    for number, prompt in enumerate(prompts(lengths)):
        tokens = steps if number == 0 else 1 + (steps * (7 * number % 12)) // 14
        mode = "off" if number % 3 == 2 else "on"
        start = number * steps // 14
        found.append(Asked(f"request-{number}", prompt, tokens, {"sparse_attention": mode}, start))
    return found


def _answers(
    folder: Path, maskers: Maskers, device: str, is_eager: bool, asked: list[Asked]
) -> dict[str, Answered]:
    options: dict[str, Any] = {"enforce_eager": True}
    if not is_eager:
        options = {"compilation_config": GRAPHS | {"cudagraph_capture_sizes": _SIZES}}
    engine = small_engine(str(folder), maskers, device, **options)
    try:
        if not is_eager:
            mode = engine.llm_engine.vllm_config.compilation_config.cudagraph_mode
            # vLLM turns graphs off, and says so in its log, where a backend does not support them.
            if mode is None or "FULL" not in str(mode):
                raise RuntimeError(f"the engine has no CUDA graphs: its mode is {mode}")
        return answers(engine, asked)
    finally:
        let_go(engine)


def measure(device: str, configs: Sequence[str], steps: int = 100) -> dict[str, Any]:
    """Compares engines.

    Args:
        device: "cuda", or "cpu" for a dry run of two eager engines.
        configs: Of the servers.
        steps: See `schedule`.
    """
    records: list[dict[str, Any]] = []
    failures: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder)
        asked = schedule(steps)
        for config in configs:
            maskers = token_configs(folder)[config]
            try:
                eager = _answers(folder, maskers, device, True, asked)
                graph = _answers(folder, maskers, device, device == "cpu", asked)
            except Exception as error:  # the other lists are compared anyhow
                logger.exception("%s", config)
                failures.append(f"{config}: {type(error).__name__}: {error}"[:500])
                continue
            for request, expected in eager.items():
                comparison = compare(expected, graph[request], TOLERANCE)
                records.append({"config": config, "request": request, **asdict(comparison)})
                if comparison.problem is not None:
                    failures.append(f"{config}, {request}: {comparison.problem}")
            logger.info("%s: compared", config)
    return {"tolerance": TOLERANCE, "records": records, "failures": failures}


def stage(device: str, is_quick: bool, variant: str) -> dict[str, Any]:
    """The stage's result; see `command.run_stage`."""
    prepare_environment()
    if device == "cpu":
        return measure(device, CONFIGS[:1], steps=14)
    return measure(device, CONFIGS[:1] if is_quick else CONFIGS)


if __name__ == "__main__":
    run_stage("graphs", __doc__ or "", stage)
