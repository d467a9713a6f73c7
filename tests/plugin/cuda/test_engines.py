"""vLLM's CUDA code path, on a GPU that is not there, against vLLM's CPU engine."""

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from tests.plugin.cuda.run_engines import DRY_OPTIONS, OPTIONS, run_engines, write_tiny_llama

PROMPTS = [list(range(start, start + length)) for start, length in ((3, 5), (30, 40), (99, 75))]
BATCH = [{"prompt_token_ids": prompt, "max_tokens": 6} for prompt in PROMPTS]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_llama(tmp_path_factory.mktemp("llama")))


@pytest.fixture(scope="module")
def expected(model: str, tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
    """What vLLM's CPU engine answers to `BATCH`."""
    engine = {"options": {**OPTIONS, "model": model}, "batches": [BATCH]}
    answer = run_engines([engine], tmp_path_factory.mktemp("cpu"), dry=False)[0]
    assert answer["platform"] == "CpuPlatform"
    tokens: list[list[int]] = answer["tokens"][0]
    assert len({tuple(found) for found in tokens}) == len(tokens)
    return tokens


@pytest.fixture(scope="module")
def answers(model: str, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """One process for all of them, since importing vLLM takes longer than starting an engine."""
    options = {**DRY_OPTIONS, "model": model, "attention_backend": "TRITON_ATTN"}
    engines: list[dict[str, Any]] = [
        {"options": {**options, "enforce_eager": True}, "batches": [BATCH]},
    ]
    return run_engines(engines, tmp_path_factory.mktemp("dry"), dry=True)


def test_runner_v2(answers: list[dict[str, Any]], expected: list[list[int]]) -> None:
    assert answers[0]["platform"] == "DryCudaPlatform"
    assert answers[0]["runner"] == "vllm.v1.worker.gpu.model_runner.GPUModelRunner"
    assert answers[0]["tokens"] == [expected]
