"""An engine with few KV blocks and a masker of one's own: preemption, and the general path."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.plugin.cuda.run_engines import OPTIONS, SHAPE, run_on_cpu, write_tiny_llama

HEADS = 2 * SHAPE["num_attention_heads"]  # of two layers
TOKENS = 120


def request(length: int, tokens: int, **extra: Any) -> dict[str, Any]:
    prompt = [37 * place % 512 for place in range(length)]
    return {"prompt_token_ids": prompt, "max_tokens": tokens, "extra_args": extra}


SHORT_WINDOW = json.dumps({"maskers": [{"type": "local", "window_size": 32}]})
REQUESTS = [
    request(260, TOKENS),
    request(260, TOKENS, sparse_attention="off"),
    request(
        260,
        TOKENS,
        sparse_attention_config=SHORT_WINDOW,
        sparse_attention_dense_prefix=100,
    ),
    request(260, TOKENS, sparse_attention_dense_prefix=0),
]
CUSTOM = request(200, 10, sparse_attention_tag="custom")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """24 blocks of 32 tokens, and `every_nth` as the server's masker."""
    folder: Path = tmp_path_factory.mktemp("preemption")
    config = {
        "imports": ["tests.e2e.custom_masker"],
        "maskers": [{"type": "every_nth", "stride": 3}],
        "min_sparse_keys": 0,
    }
    engine = {
        "options": {
            **OPTIONS,
            "model": str(write_tiny_llama(folder / "model")),
            "max_model_len": 512,
            "block_size": 32,
            "num_gpu_blocks_override": 24,
            "enable_prefix_caching": True,
            "attention_backend": "CUSTOM",
            "additional_config": {"sparse_attention": config},
        },
        "batches": [*([one] for one in REQUESTS), [CUSTOM], REQUESTS],
        "calls": [["sparse_attention_stats", ["custom"]]],
    }
    return run_on_cpu({"one": engine}, folder / "job")["one"]


def test_preempted_requests_give_what_they_give_alone(report: dict[str, Any]) -> None:
    *alone, _, together = report["tokens"]
    assert report["preemptions"] > 0
    assert [answer for [answer] in alone] == together
    # They were asked the same, and read different keys.
    assert len(set(map(tuple, together))) == len(REQUESTS)
    assert report["prefix_hits"] > 0


def test_a_masker_that_the_plugin_has_never_heard_of(report: dict[str, Any]) -> None:
    """Its density follows from its definition: the query itself, and every third key."""
    read = visible = 0
    for position in range(200, 209):
        read += len({*range(0, position + 1, 3), position})
        visible += position + 1
    [[counts]] = report["calls"]
    assert counts["read_keys"] == read * HEADS
    assert counts["visible_keys"] == visible * HEADS
