"""Per-request parameters over HTTP: what they do, what is refused, and mixed batches."""

import json
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from tests.e2e.texts import prompt

SINK_LOCAL = '{"maskers": [{"type": "sink", "sink_size": 2}, {"type": "local", "window_size": 8}]}'


BAD_VALUES = [
    ({"sparse_attention": "maybe"}, 'sparse_attention must be "on" or "off", got \'maybe\''),
    ({"sparse_attention_dense_prefix": -1}, "dense_prefix must be an integer >= 0"),
    ({"sparse_attention_dense_prefix": 1.5}, "dense_prefix must be an integer >= 0"),
    ({"sparse_attention_config": "strong-llm"}, "'strong-llm' is not a preset; allowed:"),
    ({"sparse_attention_config": "{"}, "must be JSON"),
    (
        {"sparse_attention_config": '{"maskers": [{"type": "snik", "sink_size": 1}]}'},
        "did you mean 'sink'",
    ),
    (
        {"sparse_attention_config": '{"maskers": [{"type": "sink", "sink_size": 0}]}'},
        "sink_size must be an integer >= 1 (keys) or a float in (0, 1]",
    ),
    ({"sparse_attention_tag": "a b"}, "sparse_attention_tag must match"),
    ({"sparse_attention_fog": 1}, "sparse_attention_fog is not known"),
    ({"sparse_attention_resolved": "x"}, "sparse_attention_resolved is not known"),
]


def test_bad_values_are_400_and_disturb_nobody(sparse, model_path) -> None:
    tokens = prompt(model_path, 400, 100)
    alone = sparse.complete(tokens, 40, ignore_eos=True, sparse_attention="on").token_ids
    with ThreadPoolExecutor() as pool:
        others = [
            pool.submit(sparse.complete, tokens, 40, ignore_eos=True, sparse_attention="on")
            for _ in range(2)
        ]
        for parameters, message in BAD_VALUES:
            with pytest.raises(openai.BadRequestError) as error:
                sparse.complete(tokens, **parameters)
            assert error.value.status_code == 400
            assert message in str(error.value)
        assert not any(other.done() for other in others)
        assert [other.result().token_ids for other in others] == [alone, alone]


@pytest.mark.parametrize("stream", [False, True])
def test_maskers_that_would_fail_in_a_step_are_400(sparse, stream: bool) -> None:
    """Behind others that select all of a few keys; also where the answer is streamed."""
    maskers = [
        {"type": "sink", "sink_size": 16},
        {"type": "local", "window_size": 64},
        {"type": "pq_cache", "heavy_size": 0.1, "pq_sub_dim": 7, "pq_bits": 2},
    ]
    config = {
        "sparse_attention": "on",
        "sparse_attention_config": json.dumps({"maskers": maskers}),
    }
    with pytest.raises(openai.BadRequestError, match="pq_sub_dim must divide the head size"):
        sparse.openai.completions.create(
            model=sparse.server.model_name,
            prompt="word " * 300,
            max_tokens=4,
            stream=stream,
            extra_body={"vllm_xargs": config},
        )


def test_chat_completions_take_the_same_parameters(sparse) -> None:
    def chat(**xargs):
        return sparse.openai.chat.completions.create(
            model=sparse.server.model_name,
            messages=[{"role": "user", "content": "What is the capital of France?"}],
            max_tokens=16,
            temperature=0,
            extra_body={"vllm_xargs": xargs},
        )

    assert "Paris" in chat(sparse_attention="off").choices[0].message.content
    usage = chat(sparse_attention="on", sparse_attention_tag="chat").usage
    # Every generated token but the last is fed back.
    assert sparse.statistics("chat").json()["sparse_queries"] == usage.completion_tokens - 1
    with pytest.raises(openai.BadRequestError, match="on"):
        chat(sparse_attention="yes")


def test_modes_of_tokens(sparse, model_path) -> None:
    tokens = prompt(model_path, 500, 700)
    cases = {
        "default": ({}, 15, 700),
        "prefix": ({"sparse_attention_dense_prefix": 600}, 115, 600),
        "long-prefix": ({"sparse_attention_dense_prefix": 705}, 10, 705),
        "none": ({"sparse_attention_dense_prefix": 0}, 715, 0),
    }
    for tag, (parameters, num_sparse, num_dense) in cases.items():
        sparse.complete(
            tokens, salt=tag, sparse_attention="on", sparse_attention_tag=tag, **parameters
        )
        counts = sparse.statistics(tag).json()
        assert (counts["sparse_queries"], counts["dense_queries"]) == (num_sparse, num_dense), tag
        assert 0 < counts["density"] < 1
    sparse.complete(tokens, sparse_attention="off", sparse_attention_tag="off")
    counts = sparse.statistics("off").json()
    assert (counts["sparse_queries"], counts["density"]) == (0, 1.0)


def test_statistics_route(sparse) -> None:
    assert sparse.statistics("never-seen").status_code == 404
    report = sparse.statistics().json()
    assert report["config"]["maskers"][0] == {"type": "sink", "sink_size": 4}
    assert report["config"]["sparse_by_default"] is False
    assert report["min_sparse_keys"] == 0
    assert set(report["totals"]) == {
        "sparse_queries",
        "dense_queries",
        "automatic_dense_queries",
        "fallback_queries",
        "read_keys",
        "visible_keys",
        "read_bytes",
        "visible_bytes",
        "general_rows",
        "density",
    }


def test_a_mixed_batch_gives_each_request_what_it_gets_alone(sparse, model_path) -> None:
    """Dense and sparse, long and short, one token and many, prefill beside decode."""
    requests = [
        (prompt(model_path, 1000, 900), 16, {"sparse_attention": "off"}),
        (prompt(model_path, 2000, 40), 30, {"sparse_attention": "on"}),
        (prompt(model_path, 3000, 1), 8, {"sparse_attention": "on"}),
        (
            prompt(model_path, 1500, 1100),
            16,
            {"sparse_attention": "on", "sparse_attention_dense_prefix": 700},
        ),
        (prompt(model_path, 2500, 129), 16, {"sparse_attention": "on"}),
        (
            prompt(model_path, 1700, 500),
            16,
            {"sparse_attention": "on", "sparse_attention_config": SINK_LOCAL},
        ),
        (
            prompt(model_path, 1800, 400),
            16,
            {"sparse_attention": "on", "sparse_attention_config": "sink-local-oracle"},
        ),
    ]
    alone = [
        sparse.complete(tokens, count, salt="alone", **parameters)
        for tokens, count, parameters in requests
    ]
    with ThreadPoolExecutor(len(requests)) as pool:
        together = list(
            pool.map(
                lambda item: sparse.complete(item[0], item[1], salt="together", **item[2]), requests
            )
        )
    for one, other in zip(alone, together, strict=True):
        assert one.token_ids == other.token_ids
        # Logprobs of order 1; matrix products of another batch size sum in another order.
        assert other.logprobs.token_logprobs == pytest.approx(one.logprobs.token_logprobs, abs=1e-3)


def test_the_configuration_as_json_of_the_server_is_readable_by_a_client(sparse) -> None:
    maskers = sparse.statistics().json()["config"]["maskers"]
    text = json.dumps({"maskers": maskers})
    sparse.complete("Hello", 4, sparse_attention="on", sparse_attention_config=text)


def test_few_keys_are_not_worth_a_masker(sparse, model_path) -> None:
    tokens = prompt(model_path, 3600, 50)
    sparse.complete(
        tokens,
        tokens=30,
        ignore_eos=True,
        sparse_attention="on",
        sparse_attention_min_keys=61,
        sparse_attention_tag="few",
    )
    counts = sparse.statistics("few").json()
    # 29 decode steps: those that see 51 to 60 keys, and those that see 61 to 79.
    assert counts["automatic_dense_queries"] == 10
    assert counts["sparse_queries"] == 19
    assert counts["dense_queries"] == 60
