"""The CUDA backend in real engines, on a GPU that is not there, against the CPU backend.

Both have the same maskers, kernels of the same arithmetic, and float32 weights; so the answers are
the same tokens, and (but for preempted requests and the general path, which do more than they
would) the counts of what was read are the same numbers.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from tests.plugin.cuda.dry_cuda import GRAPHS
from tests.plugin.cuda.run_engines import (
    DRY_OPTIONS,
    OPTIONS,
    run_both,
    run_ranks,
    write_tiny_llama,
)

V1 = {"VLLM_USE_V2_MODEL_RUNNER": "0"}
SINK_LOCAL = [{"type": "sink", "sink_size": 4}, {"type": "local", "window_size": 8}]
QUEST = {
    "type": "quest_top_k",
    "heavy_size": 16,
    "page_size": 8,
    "label_bits": 8,
    "head_granularity": "kv_head",
}
SAMPLE = {
    "type": "adaptive_sampling",
    "base_rate_sampling": 0.1,
    "epsilon": 0.3,
    "delta": 0.3,
    "init_offset": 2,
    "local_offset": 2,
}
PQ = {"type": "pq_cache", "heavy_size": 8, "pq_sub_dim": 16, "pq_bits": 3}
SOCKET = {"type": "socket", "heavy_size": 8, "K": 4, "L": 20}
OFF = {"sparse_attention": "off"}
OWN = {"sparse_attention_config": json.dumps({"maskers": SINK_LOCAL})}
"""Maskers that no CUDA graph has."""
SPARSE_PROMPT = {"sparse_attention_dense_prefix": 7}
STATISTICS = [["sparse_attention_stats", []]]
DUMMY = [["execute_dummy_batch", []]]
"""What a data-parallel rank without requests does; finished requests are still in the slots."""


def prompt(start: int, length: int) -> list[int]:
    return [3 + (start + 7 * place) % 500 for place in range(length)]


def request(start: int, length: int, tokens: int, arrives: int = 0, **extra: Any) -> dict[str, Any]:
    return {
        "prompt_token_ids": prompt(start, length),
        "max_tokens": tokens,
        "arrives": arrives,
        "extra_args": extra,
    }


LONG_RUN = [
    request(0, 40, 100),
    request(1, 5, 12, arrives=2, **OFF),
    request(2, 75, 20, arrives=5),
    request(3, 33, 9, arrives=9, **SPARSE_PROMPT),
    request(4, 16, 30, arrives=30),
    request(5, 100, 25, arrives=35, **OFF),
    request(6, 1, 20, arrives=41),
    request(7, 64, 6, arrives=70, **OWN),
    request(8, 31, 20, arrives=82),
]
"""Over 100 steps: 1 to 4 requests that come and go, sparse and dense, in any mixture."""

SHORT_RUN = [
    request(0, 40, 6),
    request(1, 5, 9, arrives=1, **OFF),
    request(2, 20, 4, arrives=3, **SPARSE_PROMPT),
    request(7, 30, 3, arrives=5, **OWN),
]

SHARED = [
    request(0, 70, 8),
    request(0, 70, 8, arrives=3),  # finds the first one's blocks
    request(0, 70, 8, arrives=4, **OFF),  # must not
    request(0, 50, 20, arrives=4),
    request(9, 90, 12, arrives=6),
]
"""Prefixes in common, and more keys than there are blocks for (see `FEW_BLOCKS`)."""

LEARNED_RUN = [
    request(0, 40, 40),  # doubles to 64 keys while it decodes
    request(1, 5, 9, arrives=1, **OFF),
    request(2, 20, 8, arrives=3, **SPARSE_PROMPT),  # doubles within its prompt
    request(0, 40, 12, arrives=8),  # finds the first one's blocks, and their codes
    request(0, 68, 9, arrives=12),  # wants other codes of them
    request(7, 30, 3, arrives=24, **OWN),
]
"""For maskers that learn from each sequence."""

FEW_BLOCKS = {"num_gpu_blocks_override": 11, "max_model_len": 128}


@dataclass
class Case:
    """What one engine is asked.

    Attributes:
        attention: Of the server's configuration.
        batches: See `engines`.
        options: Of the engine, besides.
    """

    attention: dict[str, Any]
    batches: list[list[dict[str, Any]]]
    options: dict[str, Any] = field(default_factory=dict)

    def engine(self, model: str, options: dict[str, Any]) -> dict[str, Any]:
        attention = {"min_sparse_keys": 0, **self.attention}
        return {
            "options": {
                **options,
                "model": model,
                "attention_backend": "CUSTOM",
                "additional_config": {"sparse_attention": attention},
                **self.options,
            },
            "batches": self.batches,
            "calls": STATISTICS,
        }


CASES = {
    "quest": Case({"maskers": [*SINK_LOCAL, QUEST]}, [LONG_RUN]),
    "short": Case({"maskers": [*SINK_LOCAL, QUEST]}, [SHORT_RUN]),
    # A dense layer, a layer with maskers of its own, query heads that select by themselves,
    # samples; prefixes in common, chunks, and so few blocks that requests are preempted.
    "mixed": Case(
        {
            "maskers": [
                {"type": "oracle_top_k", "heavy_size": 0.2, "head_granularity": "query_head"},
                SAMPLE,
            ],
            "dense_layers": [0],
        },
        [SHARED],
        {"enable_prefix_caching": True, "max_num_batched_tokens": 48},
    ),
    "learned": Case(
        {"maskers": [*SINK_LOCAL, PQ]},
        [LEARNED_RUN],
        {"enable_prefix_caching": True, "max_num_batched_tokens": 48},
    ),
    # No masker of the server's own takes the fast path.
    "general": Case(
        {"maskers": [*SINK_LOCAL, SOCKET]},
        [[request(2, 30, 6), request(3, 20, 6, arrives=2, **OWN)]],
    ),
}


@dataclass(frozen=True)
class Answers:
    """By case: of the CPU backend; and by case and kind of engine, of the CUDA backend."""

    cpu: dict[str, dict[str, Any]]
    dry: dict[tuple[str, str], dict[str, Any]]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Answers:
    folder: Path = tmp_path_factory.mktemp("sparse")
    model = str(write_tiny_llama(folder / "llama"))
    dry: dict[tuple[str, str], dict[str, Any]] = {}
    graphs = {**DRY_OPTIONS, "compilation_config": GRAPHS}
    for name in ("quest", "mixed", "learned", "general"):
        dry[name, "graphs"] = CASES[name].engine(model, graphs)
    dry["mixed", "graphs"]["options"].update(FEW_BLOCKS)
    short = CASES["short"]
    dry["short", "eager"] = short.engine(model, {**DRY_OPTIONS, "enforce_eager": True})
    learned = CASES["learned"].engine(model, graphs)
    dry["learned", "V1 graphs"] = {**learned, "environment": V1}
    for name, kind in (("quest", "graphs"), ("short", "eager"), ("learned", "V1 graphs")):
        dry[name, kind]["calls"] = [*DUMMY, *DUMMY, *STATISTICS]
    dry["quest", "speculative"] = {
        **dry["quest", "graphs"],
        "options": {
            **dry["quest", "graphs"]["options"],
            # Of one and of two requests, with their drafts.
            "compilation_config": {**GRAPHS, "cudagraph_capture_sizes": [3, 6]},
            "speculative_config": {
                "method": "ngram",
                "num_speculative_tokens": 2,
                "prompt_lookup_max": 2,
            },
        },
        "batches": [[request(0, 40, 12, sparse_attention_tag="t"), request(1, 5, 12, **OFF)]],
        "calls": [["sparse_attention_stats", ["t"]]],
    }
    cpu = {name: case.engine(model, OPTIONS) for name, case in CASES.items()}
    dense = [[request(0, 40, 12, **OFF), request(1, 5, 12, **OFF)]]
    cpu["dense"] = {**cpu["quest"], "batches": dense}
    return Answers(*run_both(cpu, dry, folder))


@pytest.mark.parametrize(
    ("case", "kind"),
    [
        ("quest", "graphs"),
        ("short", "eager"),
        ("mixed", "graphs"),
        ("learned", "graphs"),
        ("learned", "V1 graphs"),
        ("general", "graphs"),
    ],
)
def test_tokens_and_counts_are_the_cpu_s(answers: Answers, case: str, kind: str) -> None:
    found, expected = answers.dry[case, kind], answers.cpu[case]
    assert found["platform"] == "DryCudaPlatform"
    assert found["tokens"] == expected["tokens"]
    [counts], [right] = found["calls"][-1], expected["calls"][-1]
    if case in ("quest", "short"):
        assert counts == right
    if case == "learned":  # shared in blocks of another size, and so fewer dense queries
        for name in ("sparse_queries", "read_keys", "visible_keys"):
            assert counts[name] == right[name]
    assert counts["sparse_queries"] > 0
    assert counts["density"] < 0.9


def test_the_mixed_run_preempts_and_finds_prefixes(answers: Answers) -> None:
    report = answers.dry["mixed", "graphs"]
    assert report["preemptions"] > 0
    assert report["prefix_hits"] > 0


def test_the_long_run_is_long_and_sparse_answers_differ_from_dense_ones(answers: Answers) -> None:
    report = answers.dry["quest", "graphs"]
    assert report["steps"] > 100
    assert report["replays"] > 60
    assert report["calls"][-1][0]["density"] < 0.6


def test_two_tensor_parallel_ranks(answers: Answers, tmp_path: Path) -> None:
    """Each has one of the two KV heads; both choose the same graphs and the same tokens."""
    model = str(write_tiny_llama(tmp_path / "llama"))
    engine = CASES["short"].engine(model, {**DRY_OPTIONS, "compilation_config": GRAPHS})
    reports = run_ranks(engine, tmp_path, 2)
    expected = answers.cpu["short"]
    assert [report["tokens"] for report in reports] == [expected["tokens"]] * 2
    counts = [report["calls"][0][0] for report in reports]
    right = expected["calls"][0][0]
    for name in ("read_keys", "visible_keys", "read_bytes", "visible_bytes"):
        assert counts[0][name] + counts[1][name] == right[name]
    assert counts[0]["sparse_queries"] == counts[1]["sparse_queries"] == right["sparse_queries"]
    assert {report["replays"] for report in reports} == {reports[0]["replays"]}
    assert reports[0]["replays"] > 3


def test_graphs_of_dense_steps_and_of_sparse_ones(answers: Answers) -> None:
    sizes = len(GRAPHS["cudagraph_capture_sizes"])
    assert answers.dry["quest", "graphs"]["captured"] == 2 * sizes
    assert answers.dry["mixed", "graphs"]["captured"] == 2 * sizes
    assert answers.dry["learned", "graphs"]["captured"] == 2 * sizes
    for kind in ("graphs", "V1 graphs"):
        # But for the steps in which a sequence is new, has doubled, or asks for other maskers.
        assert answers.dry["learned", kind]["replays"] > 20
    assert answers.dry["learned", "V1 graphs"]["captured"] == sizes
    # No graph can hold maskers that take the general path.
    assert answers.dry["general", "graphs"]["captured"] == sizes
    assert answers.dry["general", "graphs"]["replays"] == 0
    assert answers.dry["short", "eager"]["replays"] == 0


def test_the_general_path_is_counted(answers: Answers) -> None:
    assert answers.dry["general", "graphs"]["calls"][0][0]["general_rows"] > 0


def test_speculative_decoding_falls_back_to_dense_and_says_so(answers: Answers) -> None:
    report = answers.dry["quest", "speculative"]
    assert report["tokens"] == answers.cpu["dense"]["tokens"]
    assert report["replays"] > 0  # vLLM's own graphs serve it
    counts = report["calls"][0][0]
    assert counts["sparse_queries"] == 0
    assert counts["fallback_queries"] > 0
    assert counts["dense_queries"] >= counts["fallback_queries"]
