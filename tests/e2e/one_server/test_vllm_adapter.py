"""`ModelAdapterVLLM` on a real server: beside `ModelAdapterHF`, argument by argument."""

import threading
import uuid

import pytest
import torch
from transformers import TextIteratorStreamer, TextStreamer

from examples.documents import python_manual
from sparse_attention_hub import ModelAdapterHF, ModelAdapterVLLM, Request
from sparse_attention_hub.adapters import ServerRequestError
from sparse_attention_hub.sparse_attention.serialization import config_from_dict

BLOCK = 128  # tokens, vLLM's on a CPU
CONFIG = config_from_dict(
    {"maskers": [{"type": "sink", "sink_size": 16}, {"type": "local", "window_size": 48}]}
)
REQUEST = Request(
    "Some words about Python.\n\n" + python_manual(["assert"], 400),
    ["\n\nWhat does assert do?", "\n\nWhat is __debug__?"],
)


@pytest.fixture(scope="module")
def served(sparse, model_path) -> ModelAdapterVLLM:
    return ModelAdapterVLLM(model_path, CONFIG, base_url=sparse.server.base_url)


@pytest.fixture(scope="module")
def reference(model_path):
    with ModelAdapterHF(
        model_path, CONFIG, model_kwargs={"dtype": torch.float32}, device=None
    ) as adapter:
        yield adapter


def in_mode(mode: str, adapter, *arguments):
    if mode == "dense":
        return adapter.process_request(*arguments)
    with adapter.enable_sparse_mode():
        return adapter.process_request(*arguments)


@pytest.mark.parametrize("mode", ["dense", "sparse"])
def test_questions_share_one_prefill_of_their_context(sparse, served, mode) -> None:
    """Read from the engine's own counters: each further question computes its own tokens alone."""
    # Of this run alone: nothing of it is in the cache yet.
    context = f"Text {uuid.uuid4()}.\n\n" + python_manual(["operator-summary"], 5000)
    questions = [f"\n\nQuestion {letter}: what is this about?" for letter in "ABCD"]

    def counters() -> dict[str, float]:
        return {
            "queried": sparse.metric("vllm:prefix_cache_queries_total"),
            "found": sparse.metric("vllm:prefix_cache_hits_total"),
            "computed": sparse.metric("vllm:request_prefill_kv_computed_tokens_sum"),
        }

    before = counters()
    response = in_mode(mode, served, Request(context, questions), {"max_new_tokens": 4})
    grown = {name: value - before[name] for name, value in counters().items()}
    prompts = [item.prompt_tokens for item in response.details]
    # A block that holds the first question's tokens too is of no use to the others.
    shared = response.details[0].context_tokens // BLOCK * BLOCK
    assert shared >= 4 * BLOCK
    assert grown["queried"] == sum(prompts)
    # The chat template's head may be cached from elsewhere, but is shorter than a block.
    assert grown["found"] == (len(questions) - 1) * shared
    assert grown["computed"] == sum(prompts) - grown["found"]


@pytest.mark.parametrize(
    ("mode", "generation"),
    [
        ("dense", {"stop_strings": "function", "max_new_tokens": 12}),
        ("sparse", {"stop_strings": [" zebra", "function"], "max_new_tokens": 12}),
        ("sparse", {"repetition_penalty": 1.5, "max_new_tokens": 6}),
        ("sparse", {"max_new_tokens": 0}),
    ],
    ids=["stop", "stops", "penalty", "nothing"],
)
def test_arguments_do_what_they_do_in_process(served, reference, mode, generation) -> None:
    # Of this case alone: what the prefix cache has is not computed, and so not counted.
    request = Request(f"Case {sorted(generation)}. {REQUEST.context}", REQUEST.questions)
    expected = in_mode(mode, reference, request, generation)
    found = in_mode(mode, served, request, generation)
    assert found.responses == expected.responses
    for one, other in zip(expected.details, found.details, strict=True):
        assert other.token_ids == one.token_ids
        assert other.finish_reason == one.finish_reason
        if "stop_strings" in generation:
            # The engine has gone on by a token when it hears that the text has a stop string.
            assert other.density == pytest.approx(one.density, rel=0.05)
        else:
            assert (other.read_keys, other.visible_keys) == (one.read_keys, one.visible_keys)
            assert other.density == one.density
    if "stop_strings" in generation:
        assert "stop" in {item.finish_reason for item in found.details}


def test_ends(served, reference) -> None:
    """The model's own end, none at all before `min_new_tokens`, and one that is given."""
    request = Request("", "What is the capital of France?")
    plain = served.process_request(request, {"max_new_tokens": 32}).details[0]
    assert plain.finish_reason == "stop"
    assert plain.token_ids[-1] == served.tokenizer.eos_token_id
    more = {"max_new_tokens": 16, "min_new_tokens": plain.new_tokens + 3}
    assert served.process_request(request, more).details[0].new_tokens >= plain.new_tokens + 3
    early = {"max_new_tokens": 32, "eos_token_id": plain.token_ids[2]}
    found, expected = (item.process_request(request, early) for item in (served, reference))
    assert found.details[0].token_ids == expected.details[0].token_ids == plain.token_ids[:3]
    assert found.responses == expected.responses


def test_sampling(served) -> None:
    sampled = {"do_sample": True, "temperature": 1.5, "seed": 7, "max_new_tokens": 6}
    first, again = (served.process_request(REQUEST, sampled) for _ in range(2))
    assert [item.token_ids for item in first.details] == [item.token_ids for item in again.details]
    other = served.process_request(REQUEST, {**sampled, "seed": 8})
    assert first.responses != other.responses
    # One candidate leaves nothing to chance.
    greedy = served.process_request(REQUEST, {"max_new_tokens": 6})
    for narrow in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}):
        assert served.process_request(REQUEST, {**sampled, **narrow}).responses == greedy.responses


def test_several_answers_to_each_question(served) -> None:
    sampled = {"do_sample": True, "temperature": 1.2, "seed": 3, "max_new_tokens": 6}
    response = in_mode("sparse", served, REQUEST, {**sampled, "num_return_sequences": 3})
    for text, item in zip(response.responses, response.details, strict=True):
        texts = {text, *(other.text for other in item.alternatives)}
        assert len(item.alternatives) == 2
        assert len(texts) == 3
        for other in item.alternatives:
            assert other.text == served.tokenizer.decode(other.token_ids, skip_special_tokens=True)
            assert other.finish_reason in ("stop", "length")
        assert item.density < 1


def test_a_sparse_context_is_the_references(served, reference) -> None:
    request = Request("All sparse.\n\n" + python_manual(["assert"], 300), REQUEST.questions)
    arguments = (request, {"max_new_tokens": 6}, {"sparse_context": True})
    expected, found = (in_mode("sparse", adapter, *arguments) for adapter in (reference, served))
    assert found.responses == expected.responses
    # The first question pays for the context, where the other way nobody counts it.
    one, other = expected.details[0], found.details[0]
    assert (other.read_keys, other.visible_keys) == (one.read_keys, one.visible_keys)
    dense_context = in_mode("sparse", served, *arguments[:2]).details[0]
    assert other.visible_keys > dense_context.visible_keys
    with pytest.raises(ValueError, match="needs sparse mode"):
        served.process_request(*arguments)


class Recorder:
    def __init__(self) -> None:
        self.calls: list[object] = []

    def put(self, value: torch.Tensor) -> None:
        self.calls.append((value.device.type, value.dtype, value.tolist()))

    def end(self) -> None:
        self.calls.append("end")


def test_a_streamer_is_called_as_by_generate(served, reference) -> None:
    calls = []
    for adapter in (reference, served):
        streamer = Recorder()
        in_mode("sparse", adapter, REQUEST, {"streamer": streamer, "max_new_tokens": 3})
        calls.append(streamer.calls)
    assert calls[0] == calls[1]
    assert len(calls[0]) == 2 * (1 + 3 + 1)


def test_text_arrives_while_the_answer_is_still_generated(served) -> None:
    streamer = TextIteratorStreamer(served.tokenizer, skip_prompt=True, skip_special_tokens=True)
    request = Request(REQUEST.context, REQUEST.questions[0])
    answers: list[str] = []
    asking = threading.Thread(
        target=lambda: answers.append(
            served.process_request(
                request, {"streamer": streamer, "max_new_tokens": 24, "min_new_tokens": 24}
            ).responses
        )
    )
    asking.start()
    pieces = iter(streamer)
    first = next(piece for piece in pieces if piece)
    assert not answers
    text = first + "".join(pieces)
    asking.join()
    assert text == answers[0]


def test_text_on_the_screen(served, capsys) -> None:
    streamer = TextStreamer(served.tokenizer, skip_prompt=True, skip_special_tokens=True)
    response = served.process_request(REQUEST, {"streamer": streamer, "max_new_tokens": 8})
    assert capsys.readouterr().out.splitlines() == "\n".join(response.responses).splitlines()


def test_progress_counts_the_tokens(served, capsys) -> None:
    response = served.process_request(REQUEST, {"max_new_tokens": 8}, {"show_progress": True})
    tokens = sum(item.new_tokens for item in response.details)
    captured = capsys.readouterr()
    assert f"{tokens}/{tokens}" in captured.err
    assert captured.out == ""
    served.process_request(REQUEST, {"max_new_tokens": 2}, {"show_progress": False})
    assert capsys.readouterr().err == ""


def test_times(served) -> None:
    for item in served.process_request(REQUEST, {"max_new_tokens": 4}).details:
        assert item.new_tokens == 4
        until_last = item.time_to_first_token_s + 3 * item.time_per_output_token_s
        assert 0 < item.time_to_first_token_s < until_last <= item.total_time_s + 1e-6


def test_what_the_server_refuses(served) -> None:
    too_long = Request("x " * 9000, "What is this?")
    with pytest.raises(ServerRequestError, match="8192") as error:
        served.process_request(too_long)
    assert error.value.status_code == 400
    with pytest.raises(ServerRequestError, match="temperature") as error:
        served.process_request(REQUEST, {"do_sample": True, "temperature": -1.0})
    assert error.value.status_code == 400
    with pytest.raises(ValueError, match="does not send logits"):
        served.process_request(REQUEST, None, {"return_logits": True})
