"""vLLM's CUDA code path, on a GPU that is not there, against vLLM's CPU engine."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

pytest.importorskip("vllm")

from tests.plugin.cuda.dry_cuda import GRAPHS
from tests.plugin.cuda.run_engines import DRY_OPTIONS, OPTIONS, run_engines, write_tiny_llama

PROMPTS = [list(range(start, start + length)) for start, length in ((3, 5), (30, 40), (99, 75))]
TOGETHER = [{"prompt_token_ids": prompt, "max_tokens": 6} for prompt in PROMPTS]
CHANGING = [
    {"prompt_token_ids": prompt, "max_tokens": tokens, "arrives": step}
    for prompt, tokens, step in (
        (PROMPTS[0], 3, 0),
        (PROMPTS[1], 9, 0),
        (PROMPTS[2], 3, 2),
        (PROMPTS[0][::-1], 8, 3),
        (PROMPTS[1][::-1], 4, 4),
    )
]
"""Batches of one to four requests that come and go."""

V1 = {"VLLM_USE_V2_MODEL_RUNNER": "0"}
RUNNER_V2 = "vllm.v1.worker.gpu.model_runner.GPUModelRunner"
RUNNER_V1 = "vllm.v1.worker.gpu_model_runner.GPUModelRunner"

Tokens = list[list[list[int]]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokens, dict[str, dict[str, Any]]]:
    """What the CPU engine answers, and the reports of the dry ones by their names.

    One process for all dry engines, since importing vLLM takes longer than starting one.
    """
    folder = tmp_path_factory.mktemp("engines")
    batches: dict[str, Any] = {"batches": [TOGETHER, CHANGING]}
    model: dict[str, Any] = {"model": str(write_tiny_llama(folder / "llama"))}
    options = {**DRY_OPTIONS, **model, "attention_backend": "TRITON_ATTN"}
    eager = {"options": {**options, "enforce_eager": True}, **batches}
    graphs = {"options": {**options, "compilation_config": GRAPHS}, **batches}
    dry = {
        "v2-eager": eager,
        "v2-graphs": graphs,
        "v1-eager": {**eager, "environment": V1},
        "v1-graphs": {**graphs, "environment": V1},
    }
    with ThreadPoolExecutor() as both:
        on_cpu = {"options": {**OPTIONS, **model}, **batches}
        expected = both.submit(run_engines, [on_cpu], folder, dry=False)
        answers = both.submit(run_engines, list(dry.values()), folder, dry=True)
    report = expected.result()[0]
    assert report["platform"] == "CpuPlatform"
    return report["tokens"], dict(zip(dry, answers.result(), strict=True))


def test_answers_differ(runs: tuple[Tokens, Any]) -> None:
    answers = [tuple(tokens) for batch in runs[0] for tokens in batch]
    # Two requests are asked for in both batches, and one answer has another's beginning.
    assert len(set(answers)) >= len(answers) - 1


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
@pytest.mark.parametrize(("runner", "name"), [("v2", RUNNER_V2), ("v1", RUNNER_V1)])
def test_answers_as_on_the_cpu(
    runner: str, name: str, graphs: bool, runs: tuple[Tokens, dict[str, dict[str, Any]]]
) -> None:
    expected, reports = runs
    report = reports[f"{runner}-{'graphs' if graphs else 'eager'}"]
    assert report["platform"] == "DryCudaPlatform"
    assert report["runner"] == name
    assert report["tokens"] == expected
    if graphs:
        assert report["captured"] == len(GRAPHS["cudagraph_capture_sizes"])
        assert report["replays"] >= 10
    else:
        assert report["replays"] == 0
