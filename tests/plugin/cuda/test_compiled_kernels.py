"""No request waits for a kernel to be compiled, on a GPU that is not there."""

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from tests.plugin.cuda.dry_cuda import GRAPHS
from tests.plugin.cuda.run_engines import DRY_OPTIONS, run_both, write_tiny_llama
from tests.plugin.cuda.test_sparse_engines import (
    PQ,
    QUEST,
    SAMPLE,
    SINK_LOCAL,
    SPARSE_PROMPT,
    request,
)

OF_INDEX = [{"type": "sink", "sink_size": 3}, {"type": "local", "window_size": 9}, QUEST]
BROUGHT = {"sparse_attention_config": json.dumps({"maskers": OF_INDEX})}
LAYERS, HEADS = 2, 4
"""Of the model."""
REQUESTS = [[request(0, 40, 3)], [request(1, 45, 3, **SPARSE_PROMPT)]]


def engine(model: str, maskers: list[Any], options: dict[str, Any], **more: Any) -> dict[str, Any]:
    batches = [*REQUESTS, *([[request(2, 50, 3, **BROUGHT)]] if "index" in more else [])]
    config = {"maskers": maskers, "min_sparse_keys": 0, **more}
    return {
        "options": {
            **DRY_OPTIONS,
            **options,
            "model": model,
            "attention_backend": "CUSTOM",
            "additional_config": {"sparse_attention": config},
        },
        "batches": batches,
        "calls": [["sparse_attention_stats", []]],
    }


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("compiled")
    model = str(write_tiny_llama(folder / "llama"))
    eager, graphs = {"enforce_eager": True}, {"compilation_config": GRAPHS}
    dry = {
        "eager": engine(model, [*SINK_LOCAL, QUEST, SAMPLE], eager),
        "graphs": engine(model, [*SINK_LOCAL, PQ], graphs, index=[QUEST]),
    }
    return run_both({}, dry, folder)[1]


@pytest.mark.parametrize("name", ["eager", "graphs"])
def test_kernels_are_compiled_before_the_first_request(
    answers: dict[str, dict[str, Any]], name: str
) -> None:
    own = [kernel for kernel in answers[name]["late"] if kernel.startswith("vllm_sparse_plugin")]
    assert own == []


@pytest.mark.parametrize("name", ["eager", "graphs"])
def test_steps_of_no_request_are_counted_nowhere(
    answers: dict[str, dict[str, Any]], name: str
) -> None:
    seen = [41, 42, *range(8, 48)]  # by sparse queries
    if name == "graphs":
        seen += [51, 52]
    (report,) = answers[name]["calls"][0]
    assert report["sparse_queries"] == len(seen)
    assert report["visible_keys"] == sum(seen) * LAYERS * HEADS
