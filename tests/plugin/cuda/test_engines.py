"""vLLM's CUDA code path, on a GPU that is not there, against vLLM's CPU engine."""

from typing import Any

import pytest

pytest.importorskip("vllm")

from tests.plugin.cuda.dry_cuda import GRAPHS
from tests.plugin.cuda.run_engines import DRY_OPTIONS, OPTIONS, run_both, write_tiny_llama

PROMPTS = [list(range(start, start + length)) for start, length in ((3, 5), (30, 40), (99, 75))]
CHANGING = [
    {"prompt_token_ids": prompt, "max_tokens": tokens, "arrives": step}
    for prompt, tokens, step in (
        (PROMPTS[0], 3, 0),
        (PROMPTS[1], 9, 0),
        (PROMPTS[2], 3, 2),
        (PROMPTS[0][::-1], 14, 3),
        (PROMPTS[1][::-1], 4, 4),
    )
]
"""Batches of one to four requests that come and go."""

V1 = {"VLLM_USE_V2_MODEL_RUNNER": "0"}
RUNNER_V2 = "vllm.v1.worker.gpu.model_runner.GPUModelRunner"
RUNNER_V1 = "vllm.v1.worker.gpu_model_runner.GPUModelRunner"

Report = dict[str, Any]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Report, dict[str, Report]]:
    """The report of the CPU engine, and those of the dry ones by their names."""
    folder = tmp_path_factory.mktemp("engines")
    batches: dict[str, Any] = {"batches": [CHANGING]}
    model: dict[str, Any] = {"model": str(write_tiny_llama(folder / "llama"))}
    options = {**DRY_OPTIONS, **model, "attention_backend": "TRITON_ATTN"}
    # Their prefills are eager, so both ways are taken.
    graphs = {"options": {**options, "compilation_config": GRAPHS}, **batches}
    dry = {"v2": graphs, "v1": {**graphs, "environment": V1}}
    on_cpu = {"cpu": {"options": {**OPTIONS, **model}, **batches}}
    expected, answers = run_both(on_cpu, dry, folder)
    return expected["cpu"], answers


def test_answers_differ(runs: tuple[Report, Any]) -> None:
    assert runs[0]["platform"] == "CpuPlatform"
    answers = [tuple(tokens) for batch in runs[0]["tokens"] for tokens in batch]
    assert len(set(answers)) == len(answers)


@pytest.mark.parametrize(("runner", "name"), [("v2", RUNNER_V2), ("v1", RUNNER_V1)])
def test_answers_as_on_the_cpu(
    runner: str, name: str, runs: tuple[Report, dict[str, Report]]
) -> None:
    expected, reports = runs
    report = reports[runner]
    assert report["platform"] == "DryCudaPlatform"
    assert report["runner"] == name
    assert report["tokens"] == expected["tokens"]
    for batch, expected_batch in zip(report["logprobs"], expected["logprobs"], strict=True):
        for found, wanted in zip(batch, expected_batch, strict=True):
            assert found == pytest.approx(wanted, abs=1e-4)
    assert report["captured"] == len(GRAPHS["cudagraph_capture_sizes"])
    assert report["replays"] >= 10
