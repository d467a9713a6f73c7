"""No request waits for a kernel to be compiled, on a GPU that is not there."""

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from tests.plugin.cuda.run_engines import DRY_OPTIONS, run_both, write_tiny_llama
from tests.plugin.cuda.test_sparse_engines import (
    PQ,
    QUEST,
    SINK_LOCAL,
    SPARSE_PROMPT,
    request,
)

OF_INDEX = [{"type": "sink", "sink_size": 3}, {"type": "local", "window_size": 9}, QUEST]
BROUGHT = {"sparse_attention_config": json.dumps({"maskers": OF_INDEX})}
LAYERS, HEADS = 2, 4
"""Of the model."""
REQUESTS = [
    [request(0, 30, 2)],
    [request(1, 18, 2, **SPARSE_PROMPT)],
    [request(2, 40, 2, **BROUGHT)],
]


@pytest.fixture(scope="module")
def answer(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of an engine without graphs, which would compile its own maskers' kernels but what learns."""
    folder: Path = tmp_path_factory.mktemp("compiled")
    config = {"maskers": [*SINK_LOCAL, PQ], "min_sparse_keys": 0, "index": [QUEST]}
    engine = {
        "options": {
            **DRY_OPTIONS,
            "enforce_eager": True,
            "model": str(write_tiny_llama(folder / "llama")),
            "attention_backend": "CUSTOM",
            "additional_config": {"sparse_attention": config},
        },
        "batches": REQUESTS,
        "calls": [["sparse_attention_stats", []]],
    }
    return run_both({}, {"only": engine}, folder)[1]["only"]


def test_kernels_are_compiled_before_the_first_request(answer: dict[str, Any]) -> None:
    own = [kernel for kernel in answer["late"] if kernel.startswith("vllm_sparse_plugin")]
    assert own == []


def test_steps_of_no_request_are_counted_nowhere(answer: dict[str, Any]) -> None:
    seen = [31, *range(8, 20), 41]  # by sparse queries
    (report,) = answer["calls"][0]
    assert report["sparse_queries"] == len(seen)
    assert report["visible_keys"] == sum(seen) * LAYERS * HEADS
