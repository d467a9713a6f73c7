"""Comparing answers of engines, and the committed ones that a GPU's are compared with."""

import json
from dataclasses import replace
from pathlib import Path

from benchmarks.gpu.engine_answers import Answered, compare
from benchmarks.gpu.engine_tokens import EXPECTED
from benchmarks.gpu.graph_against_eager import CONFIGS, schedule
from benchmarks.gpu.tiny_models import write_models
from benchmarks.gpu.token_configs import TOKENS, model_of, options_of, requests, token_configs

COUNTS = {"sparse_queries": 2, "general_rows": 0, "read_keys": 100, "visible_keys": 1000}
ANSWER = Answered([1, 2, 3], [-0.1, -0.2, -0.3], [1.0, 0.001, 1.0], COUNTS)


def test_the_same() -> None:
    comparison = compare(ANSWER, ANSWER, 0.002)
    assert (comparison.problem, comparison.differs_at) == (None, None)


def test_another_token_is_a_problem_unless_it_was_as_good() -> None:
    near = replace(ANSWER, token_ids=[1, 9, 9], logprobs=[-0.1, -0.2, -5.0])
    assert compare(ANSWER, near, 0.002).problem is None
    assert compare(ANSWER, near, 0.002).differs_at == 1
    other = replace(ANSWER, token_ids=[9, 2, 3])
    assert "token 0" in str(compare(ANSWER, other, 0.002).problem)


def test_other_problems() -> None:
    assert "logprobs" in str(compare(ANSWER, replace(ANSWER, logprobs=[-0.2] * 3), 0.002).problem)
    short = replace(ANSWER, token_ids=[1, 2], logprobs=[-0.1, -0.2])
    assert "2 tokens instead of 3" in str(compare(ANSWER, short, 0.002).problem)
    dense = replace(ANSWER, counts={**COUNTS, "sparse_queries": 0})
    assert "0 sparse queries" in str(compare(ANSWER, dense, 0.002).problem)
    slow = replace(ANSWER, counts={**COUNTS, "general_rows": 3})
    assert "general path" in str(compare(ANSWER, slow, 0.002).problem)
    more = replace(ANSWER, counts={**COUNTS, "read_keys": 110})
    assert "read_keys" in str(compare(ANSWER, more, 0.002).problem)


def test_the_expected_tokens_are_of_these_models_and_these_requests(tmp_path: Path) -> None:
    expected = json.loads(EXPECTED.read_text())
    assert expected["weights"] == write_models(tmp_path)
    configs = token_configs(tmp_path / "llama")
    assert list(expected["answers"]) == list(configs)
    assert set(CONFIGS) <= set(configs)
    dense = expected["answers"]["sink + window"]["request-1"]["token_ids"]
    for config, answers in expected["answers"].items():
        assert list(answers) == [request.name for request in requests()]
        for answer in answers.values():
            assert len(answer["token_ids"]) == TOKENS
        is_dense = answers["request-1"]["token_ids"] == dense  # it was asked to be
        assert is_dense == (model_of(config) == "llama" and not options_of(config))
        assert answers["request-3"]["counts"]["sparse_queries"] == TOKENS - 1
    # What maskers read shows in what is said.
    told = {tuple(a["request-3"]["token_ids"]) for a in expected["answers"].values()}
    assert len(told) == len(configs)


def test_requests_come_and_go_in_more_than_100_steps() -> None:
    asked = schedule()
    assert max(request.start + request.tokens for request in asked) > 100
    assert len({request.start for request in asked}) == len(asked)
    assert all(len(request.prompt) + request.tokens < 1024 for request in asked)
    modes = [request.parameters["sparse_attention"] for request in asked]
    assert set(modes) == {"on", "off"}
