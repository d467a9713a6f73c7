"""Engines whose steps decide by themselves who attends sparsely, on a GPU that is not there.

The clock is a formula. So is known what each step decides, and the CPU backend can be told the
same by `min_sparse_keys`.
"""

from dataclasses import dataclass
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
from tests.plugin.cuda.test_sparse_engines import QUEST, SINK_LOCAL, SPARSE_PROMPT, V1, request

MASKERS = [*SINK_LOCAL, QUEST]
FROM_50 = {"dense": [0, 0, 1e-6], "sparse": [49.5e-6, 0, 0], "least_keys": 5}
"""One request alone is worth maskers from 50 keys on."""
NOT_ALONE = {"dense": [1e-6, 0, 2e-9], "sparse": [5e-6, 0, 1e-9], "least_keys": 5}
"""No request is, unless the launches run anyhow."""
NEVER = {"dense": [1e-6, 0, 0], "sparse": [2e-6, 0, 0], "least_keys": 5}
ALWAYS = {**FROM_50, "sparse": [1e-9, 0, 0]}
FIXED = {"sparse_attention_min_keys": 0}


def tagged(tag: str) -> dict[str, str]:
    return {"sparse_attention_tag": tag}


ALONE = [
    [request(0, 40, 20)],
    [request(2, 75, 6)],
    [request(3, 70, 6, **SPARSE_PROMPT)],
]
SPARSE_CHUNKS = [*ALONE[:2], [request(3, 70, 6, **SPARSE_PROMPT, **FIXED)]]
"""Likewise: both chunks of the last prompt pay, so each is sparse as a whole."""
JOINED = [
    request(0, 40, 12, **tagged("first")),
    request(1, 20, 30, arrives=4, **FIXED, **tagged("fixed")),
]
"""The first is dense until the other decodes."""
LEFT = [
    request(0, 40, 24, **tagged("stays")),
    request(1, 20, 6, arrives=4, **FIXED),
    request(2, 70, 3, arrives=6),
]
"""The first is dense, then sparse, then dense."""
CANDIDATES = range(42, 48)
"""Keys from which on the first of `JOINED` may be sparse: whether the step after the one in which
the other arrives holds it already is the scheduler's business."""


def engine(
    model: str,
    batches: list[Any],
    options: dict[str, Any],
    least: int | str = "auto",
    tags: tuple[str, ...] = (),
    **more: Any,
) -> dict[str, Any]:
    return {
        "options": {
            **options,
            "model": model,
            "attention_backend": "CUSTOM",
            "additional_config": {
                "sparse_attention": {"maskers": MASKERS, "min_sparse_keys": least}
            },
        },
        "batches": batches,
        "calls": [["sparse_attention_stats", [tag]] for tag in (None, *tags)],
        **more,
    }


@dataclass(frozen=True)
class Answers:
    cpu: dict[str, dict[str, Any]]
    dry: dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Answers:
    folder: Path = tmp_path_factory.mktemp("automatic")
    model = str(write_tiny_llama(folder / "llama"))
    graphs = {**DRY_OPTIONS, "compilation_config": GRAPHS}
    tags = ("first", "fixed", "stays")
    dry = {
        "alone": engine(model, ALONE, graphs, costs=FROM_50),
        "joined": engine(model, [JOINED, LEFT], graphs, costs=NOT_ALONE, tags=tags),
        "never, V1": engine(model, ALONE[:2], graphs, costs=NEVER, environment=V1),
    }
    others = [
        [{**JOINED[0], "extra_args": {"sparse_attention_min_keys": least}}] for least in CANDIDATES
    ]
    cpu = {
        "alone": engine(model, SPARSE_CHUNKS, OPTIONS, 50),
        "joined": engine(model, [JOINED[1:], *others], OPTIONS, 0),
        "dense": engine(model, ALONE[:2], OPTIONS, 1000),
    }
    return Answers(*run_both(cpu, dry, folder))


def test_tokens_and_counts_are_the_cpu_s_with_the_same_decisions(answers: Answers) -> None:
    found, expected = answers.dry["alone"], answers.cpu["alone"]
    assert found["tokens"] == expected["tokens"]
    assert found["calls"] == expected["calls"]
    [[counts]] = found["calls"]
    assert counts["sparse_queries"] > 20
    assert counts["automatic_dense_queries"] > 5


def test_costs_are_what_the_clock_says(answers: Answers) -> None:
    for kind, given in (("alone", FROM_50), ("joined", NOT_ALONE)):
        [costs] = answers.dry[kind]["costs"]
        for own in costs.values():
            for name in ("dense", "sparse"):
                model = own[name]
                numbers = [model["constant"], model["per_row"], model["per_key"]]
                assert numbers == pytest.approx(given[name], abs=1e-12)


def test_a_request_changes_its_mode_when_another_joins(answers: Answers) -> None:
    report, cpu = answers.dry["joined"], answers.cpu["joined"]
    _, [first], [fixed], _ = report["calls"]
    assert fixed["automatic_dense_queries"] == 0
    assert fixed["sparse_queries"] == 29
    # 11 decode steps, in the first of which 41 keys are seen.
    dense = first["automatic_dense_queries"]
    assert dense + first["sparse_queries"] == 11
    assert dense > 0 < first["sparse_queries"]
    own, other = report["tokens"][0]
    assert own == cpu["tokens"][1 + CANDIDATES.index(41 + dense)][0]
    assert other == cpu["tokens"][0][0]


def test_a_request_changes_its_mode_twice(answers: Answers) -> None:
    graphs = answers.dry["joined"]
    [stays] = graphs["calls"][-1]
    assert stays["sparse_queries"] + stays["automatic_dense_queries"] == 23
    assert 0 < stays["sparse_queries"] <= 8
    assert stays["density"] < 1
    assert graphs["replays"] > 20


def test_where_maskers_never_pay_the_answers_are_dense(answers: Answers) -> None:
    """In graphs that hold maskers all the same: runner V1 has no others."""
    report, expected = answers.dry["never, V1"], answers.cpu["dense"]
    assert report["tokens"] == expected["tokens"]
    assert report["calls"] == expected["calls"]
    assert report["calls"][0][0]["sparse_queries"] == 0
    assert report["replays"] > 20


def test_ranks_decide_alike_though_they_measure_differently(
    answers: Answers, tmp_path: Path
) -> None:
    model = str(write_tiny_llama(tmp_path / "llama"))
    graphs = {**DRY_OPTIONS, "compilation_config": GRAPHS}
    costs = {**FROM_50, "rank_1": ALWAYS["sparse"]}
    reports = run_ranks(engine(model, ALONE[:1], graphs, costs=costs), tmp_path, 2)
    assert [report["tokens"] for report in reports] == [answers.cpu["alone"]["tokens"][:1]] * 2
    assert reports[0]["costs"] == reports[1]["costs"]
    assert reports[0]["costs"][0]["launched"]["sparse"]["constant"] == pytest.approx(49.5e-6)
    counts = [report["calls"][0][0] for report in reports]
    assert counts[0]["sparse_queries"] == counts[1]["sparse_queries"] > 0
