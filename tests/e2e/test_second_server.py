"""A server with few KV blocks and a masker of one's own: preemption, and the general path."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.e2e.texts import prompt

ON = {"sparse_attention": "on"}


@pytest.fixture(scope="module")
def small(serve):
    """40 blocks of 32 tokens for up to 8 requests, and `every_nth` as the server's masker."""
    config = {
        "imports": ["tests.e2e.custom_masker"],
        "maskers": [{"type": "every_nth", "stride": 3}],
    }
    return serve(
        config,
        ["--block-size", "32", "--num-gpu-blocks-override", "40", "--max-model-len", "1024"],
    )


def test_preempted_requests_give_what_they_give_alone(small, model_path) -> None:
    parameters = [
        {},
        {"sparse_attention": "off"},
        {"sparse_attention_config": "streaming-llm", "sparse_attention_dense_prefix": 100},
        {"sparse_attention_dense_prefix": 0},
    ]
    requests = [(prompt(model_path, 1000 * (i + 1), 260), p) for i, p in enumerate(parameters)]
    alone = [small.complete(tokens, 120, salt="alone", **p) for tokens, p in requests]
    before = small.metric("vllm:num_preemptions_total")
    with ThreadPoolExecutor() as pool:
        together = list(
            pool.map(
                lambda item: small.complete(item[0], 120, salt="together", **item[1]), requests
            )
        )
    assert small.metric("vllm:num_preemptions_total") > before
    assert [item.token_ids for item in together] == [item.token_ids for item in alone]


def test_a_masker_that_the_plugin_has_never_heard_of(small, model_path) -> None:
    """Its density follows from its definition: the query itself, and every third key."""
    tokens = prompt(model_path, 3000, 200)
    small.complete(tokens, 10, sparse_attention_tag="custom", **ON)
    read = visible = 0
    for position in range(200, 209):
        read += len({*range(0, position + 1, 3), position})
        visible += position + 1
    counts = small.statistics("custom").json()
    assert counts["read_keys"] == read * 30 * 9
    assert counts["visible_keys"] == visible * 30 * 9
