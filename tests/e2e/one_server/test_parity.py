"""The served answers are the reference's: same tokens, same keys read.

The model is real, float32 and greedy. Where two logits tie closer than float noise the two may
part; the test then prints both logits, and that it was a tie.
"""

import pytest

from examples.documents import python_manual
from sparse_attention_hub import ModelAdapterVLLM, Request
from sparse_attention_hub.sparse_attention.serialization import config_from_dict
from tests.e2e.reference import assert_same_answer, reference_adapter

TOKENS = 12
SINK_LOCAL = [{"type": "sink", "sink_size": 16}, {"type": "local", "window_size": 48}]
CONFIGS = {
    "dense": None,
    "sink-local": SINK_LOCAL,
    "oracle-count": [*SINK_LOCAL, {"type": "oracle_top_k", "heavy_size": 64}],
    "oracle-share": [*SINK_LOCAL, {"type": "oracle_top_k", "heavy_size": 0.05}],
}
# Characters of the document, and about how many tokens that gives.
CONTEXTS = {200: 800, 2000: 7400}
QUESTIONS = [
    "\n\nWhat is this text about?",
    "\n\nGive an example.",
]


def request_of(characters: int) -> Request:
    """Two questions on a short text, and one on a long one, which takes its time."""
    text = python_manual(["string-methods"], characters)
    questions = QUESTIONS if characters < 5000 else QUESTIONS[:1]
    return Request("Read this.\n\n" + text, questions, answer_prefix="Answer:")


CASES = [(name, 200) for name in CONFIGS] + [("oracle-share", 2000)]


@pytest.mark.parametrize(("name", "length"), CASES)
def test_same_tokens_and_same_density(sparse, model_path, name, length, capsys) -> None:
    maskers = CONFIGS[name]
    config = None if maskers is None else config_from_dict({"maskers": maskers})
    is_sparse = config is not None
    request, generation = request_of(CONTEXTS[length]), {"max_new_tokens": TOKENS}
    served = ModelAdapterVLLM(
        model_path, config, base_url=sparse.server.base_url, sparse_by_default=is_sparse
    ).process_request(request, generation)
    with reference_adapter(model_path, config) as adapter:
        reference = adapter.process_request(request, generation, {"return_logits": True})
    for expected, found in zip(reference.details, served.details, strict=True):
        assert abs(found.context_tokens - length) < 0.15 * length
        assert found.mode == ("sparse" if is_sparse else "dense")
        if assert_same_answer(expected, found, f"{name}, {length} tokens", capsys).is_equal:
            assert len(found.token_ids) == TOKENS or found.finish_reason == "stop"
            assert (found.read_keys, found.visible_keys) == (
                expected.read_keys,
                expected.visible_keys,
            )


LAYERS, HEADS = 30, 9  # of the small model


def test_density_is_what_an_independent_count_gives(sparse, model_path) -> None:
    """Counted here with a set per query, from the definition of the maskers alone."""
    config = config_from_dict({"maskers": CONFIGS["oracle-count"]})
    adapter = ModelAdapterVLLM(
        model_path, config, base_url=sparse.server.base_url, sparse_by_default=True
    )
    response = adapter.process_request(request_of(CONTEXTS[200]), {"max_new_tokens": TOKENS})
    for item in response.details:
        # Sparse queries: the question's tokens and every generated token that was fed back.
        last = item.prompt_tokens + len(item.token_ids) - 1
        read = visible = 0
        for position in range(item.context_tokens, last):
            keys = set(range(16)) | set(range(position - 47, position + 1))
            read += min(len(keys) + 64, position + 1)
            visible += position + 1
        assert item.read_keys == read * LAYERS * HEADS
        assert item.visible_keys == visible * LAYERS * HEADS
        assert item.density == pytest.approx(read / visible)


def test_sparse_prefill_in_chunks_is_the_reference_in_one_piece(sparse, model_path, capsys) -> None:
    """Without a context nearly the whole prompt is sparse; the server cuts it into chunks."""
    config = config_from_dict({"maskers": CONFIGS["oracle-share"]})
    request = Request("", python_manual(["formatstrings"], 2400))
    arguments = {"max_new_tokens": TOKENS}
    served = ModelAdapterVLLM(
        model_path, config, base_url=sparse.server.base_url, sparse_by_default=True
    ).process_request(request, arguments)
    with reference_adapter(model_path, config) as adapter:
        reference = adapter.process_request(request, arguments, {"return_logits": True})
    expected, found = reference.details[0], served.details[0]
    assert found.prompt_tokens - found.context_tokens > 512
    assert_same_answer(expected, found, "prefill in chunks", capsys)
    assert found.visible_keys == expected.visible_keys
