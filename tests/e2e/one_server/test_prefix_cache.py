"""What the prefix cache shares between dense and sparse requests, and what it must not.

A `cache_salt` of its own makes a request see a cold cache on a warm server.
"""

from tests.e2e.conftest import tokens_and_logprobs
from tests.e2e.texts import prompt

HITS = "vllm:prefix_cache_hits_total"
ON, OFF = {"sparse_attention": "on"}, {"sparse_attention": "off"}


def hits_of(client, run) -> tuple[float, object]:
    before = client.metric(HITS)
    result = run()
    return client.metric(HITS) - before, result


def test_a_second_question_finds_the_dense_context(sparse, model_path) -> None:
    context = prompt(model_path, 100, 1000)
    first = prompt(model_path, 5000, 20)
    second = prompt(model_path, 6000, 20)
    parameters = {**ON, "sparse_attention_dense_prefix": len(context)}
    sparse.complete(context + first, **parameters)
    hits, warm = hits_of(sparse, lambda: sparse.complete(context + second, **parameters))
    assert hits >= 1000 - 128
    cold = sparse.complete(context + second, salt="cold-1", **parameters)
    assert warm.token_ids == cold.token_ids
    # The context stays shared with dense requests too.
    hits, _ = hits_of(sparse, lambda: sparse.complete(context + second, **OFF))
    assert hits >= 1000 - 128


def test_dense_after_sparse_is_a_cold_server(sparse, model_path) -> None:
    """A block with tokens that were generated sparsely is computed anew by a dense request.

    The cold side caches the prompt's two whole blocks densely first, so that both sides compute
    the same 164 tokens in one step: vLLM's own rounding depends on how many it computes at once.
    """
    start = prompt(model_path, 200, 350)
    generated = sparse.complete(start, tokens=60, ignore_eos=True, **ON).token_ids
    follow_up = start + generated + prompt(model_path, 7000, 10)
    assert len(follow_up) == 420  # three whole blocks, the last with 34 sparse tokens
    warm_hits, warm = hits_of(sparse, lambda: sparse.complete(follow_up, **OFF))
    assert warm_hits == 256  # and not 384
    sparse.complete(start, tokens=1, salt="cold-2", **OFF)
    cold_hits, cold = hits_of(sparse, lambda: sparse.complete(follow_up, salt="cold-2", **OFF))
    assert cold_hits == 256
    assert tokens_and_logprobs(warm) == tokens_and_logprobs(cold)
    # The sparse continuation of the same request may go on from its own block.
    hits, _ = hits_of(
        sparse,
        lambda: sparse.complete(follow_up, sparse_attention_dense_prefix=len(start), **ON),
    )
    assert hits == 384


def test_sparse_prompt_tokens_are_not_reused_densely(sparse, model_path) -> None:
    """The whole prompt sparse: nothing of it may be found by a dense request."""
    tokens = prompt(model_path, 300, 800)
    everything_sparse = {**ON, "sparse_attention_dense_prefix": 0}
    sparsely = sparse.complete(tokens, **everything_sparse)
    hits, warm = hits_of(sparse, lambda: sparse.complete(tokens, **OFF))
    assert hits == 0
    cold = sparse.complete(tokens, salt="cold-3", **OFF)
    assert tokens_and_logprobs(warm) == tokens_and_logprobs(cold)
    assert tokens_and_logprobs(sparsely) != tokens_and_logprobs(cold)
    # The same configuration does find it, and other maskers do not.
    hits, again = hits_of(sparse, lambda: sparse.complete(tokens, **everything_sparse))
    assert hits >= 800 - 128
    assert again.token_ids == sparsely.token_ids
    hits, _ = hits_of(
        sparse,
        lambda: sparse.complete(
            tokens, **everything_sparse, sparse_attention_config="streaming-llm"
        ),
    )
    assert hits == 0
