"""An engine's tokens on the GPU against those of the CPU engine, with several lists of maskers.

    python -m benchmarks.gpu.engine_tokens --output FOLDER

vLLM for CUDA cannot run on the CPU of the same machine, so the expected tokens are in
`expected_tokens.json`, made by `benchmarks.gpu.expected_tokens` on a machine without a GPU. Models
and prompts are the same bit for bit; the file holds fingerprints of the weights.
"""

from __future__ import annotations

import json
import logging
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.gpu.command import run_stage
from benchmarks.gpu.engine_answers import (
    Answered,
    answers,
    compare,
    let_go,
    prepare_environment,
    small_engine,
)
from benchmarks.gpu.tiny_models import write_models
from benchmarks.gpu.token_configs import Maskers, model_of, options_of, requests, token_configs

logger = logging.getLogger(__name__)
EXPECTED = Path(__file__).parent / "expected_tokens.json"
TOLERANCE = 0.002
"""Of logprobs: sums in another order, in float32, through three layers."""


def answers_of(config: str, folder: Path, maskers: Maskers, device: str) -> dict[str, Answered]:
    """One engine's.

    Args:
        config: Name of the list of maskers.
        folder: Of the models.
        maskers: Of the server.
        device: "cuda" or "cpu".
    """
    options = options_of(config)
    engine = small_engine(
        str(folder / model_of(config)), maskers, device, enforce_eager=True, **options
    )
    try:
        return answers(engine, requests())
    finally:
        let_go(engine)


def measure(device: str, only: int | None = None) -> dict[str, Any]:
    """Compares all lists.

    Args:
        device: "cuda" or "cpu".
        only: So many of them; None: all.
    """
    expected = json.loads(EXPECTED.read_text())
    records: list[dict[str, Any]] = []
    failures: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if write_models(folder) != expected["weights"]:
            return {"records": [], "failures": ["a model has other weights on this machine"]}
        for config, maskers in list(token_configs(folder / "llama").items())[:only]:
            try:
                given = answers_of(config, folder, maskers, device)
            except Exception as error:  # the other lists are compared anyhow
                logger.exception("%s", config)
                failures.append(f"{config}: {type(error).__name__}: {error}"[:500])
                continue
            for request, answer in given.items():
                wanted = Answered(**expected["answers"][config][request])
                comparison = compare(wanted, answer, TOLERANCE)
                records.append({"config": config, "request": request, **asdict(comparison)})
                if comparison.problem is not None:
                    failures.append(f"{config}, {request}: {comparison.problem}")
            logger.info("%s: compared", config)
    return {"tolerance": TOLERANCE, "records": records, "failures": failures}


def stage(device: str, is_quick: bool, variant: str) -> dict[str, Any]:
    """The stage's result; see `command.run_stage`."""
    prepare_environment()
    return measure(device, only=3 if is_quick else None)


if __name__ == "__main__":
    run_stage("tokens", __doc__ or "", stage)
