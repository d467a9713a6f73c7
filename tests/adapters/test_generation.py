"""`generation_kwargs`: what `generate` of transformers makes of them, on a context's cache."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import GenerationConfig, StoppingCriteria, TextIteratorStreamer

from sparse_attention_hub import Request
from sparse_attention_hub.adapters import Alternative
from sparse_attention_hub.sparse_attention import (
    LocalMaskerConfig,
    ResearchAttentionConfig,
    SinkMaskerConfig,
)

CONFIG = ResearchAttentionConfig([SinkMaskerConfig(2), LocalMaskerConfig(8)])
CONTEXT = "The river Foo is 312 km long. It rises in the Bar hills and ends in lake Baz. "
REQUEST = Request(CONTEXT, "How long is it?")
SAMPLING = {"max_new_tokens": 8, "do_sample": True, "temperature": 0.8, "top_p": 0.9, "top_k": 0}


def first(adapter, generation=None, request=REQUEST, **options):
    return adapter.process_request(request, generation, options or None).details[0]


def plain(adapter, seed: int = 0, question: str = REQUEST.questions, **generation) -> list[list]:
    """Transformers alone, on the whole prompt."""
    tokenizer = adapter.tokenizer
    ids = torch.tensor([tokenizer.encode(CONTEXT) + tokenizer.encode(question)])
    torch.manual_seed(seed)
    mask = torch.ones_like(ids)
    rows = adapter.model.generate(ids, attention_mask=mask, tokenizer=tokenizer, **generation)
    return rows[:, ids.shape[1] :].tolist()


def test_greedy_and_fifty_tokens_by_default(make_tiny) -> None:
    adapter = make_tiny()
    detail = first(adapter)
    assert [list(detail.token_ids)] == plain(adapter, do_sample=False, max_new_tokens=50)
    assert detail.new_tokens == 50
    assert detail.finish_reason == "length"


def test_greedy_also_where_the_model_says_otherwise(make_tiny, monkeypatch) -> None:
    adapter = make_tiny()
    greedy = first(adapter, {"max_new_tokens": 6}).token_ids
    monkeypatch.setattr(adapter.model.generation_config, "do_sample", True)
    monkeypatch.setattr(adapter.model.generation_config, "temperature", 5.0)
    assert first(adapter, {"max_new_tokens": 6}).token_ids == greedy
    assert first(adapter, {"max_new_tokens": 6, "do_sample": True, "seed": 1}).token_ids != greedy


def test_sampling_is_that_of_transformers_with_the_same_seed(make_tiny) -> None:
    adapter = make_tiny()
    state = torch.random.get_rng_state()
    answers = {seed: first(adapter, {**SAMPLING, "seed": seed}).token_ids for seed in (1, 2)}
    assert torch.equal(torch.random.get_rng_state(), state)
    assert answers[1] != answers[2]
    for seed, tokens in answers.items():
        assert [list(tokens)] == plain(adapter, seed, **SAMPLING)


@pytest.mark.parametrize(
    "changed",
    [{"temperature": 3.0}, {"top_p": 0.01}, {"top_k": 1}, {"min_p": 0.5}],
)
def test_each_sampling_argument_is_used(make_tiny, changed: dict) -> None:
    adapter = make_tiny()
    base = {**SAMPLING, "temperature": 1.5, "seed": 4, "max_new_tokens": 20}
    arguments = {**base, **changed}
    tokens = first(adapter, arguments).token_ids
    assert tokens != first(adapter, base).token_ids
    assert [list(tokens)] == plain(adapter, arguments.pop("seed"), **arguments)


def test_a_seed_holds_while_other_threads_sample(make_tiny) -> None:
    adapter = make_tiny(CONFIG, sparse_by_default=True)
    alone = {seed: first(adapter, {**SAMPLING, "seed": seed}).token_ids for seed in range(4)}
    start = threading.Barrier(5)

    def work(seed: int | None) -> list[tuple[int, ...]]:
        start.wait(60)
        return [first(adapter, {**SAMPLING, "seed": seed}).token_ids for _ in range(3)]

    with ThreadPoolExecutor(5) as pool:
        runs = list(pool.map(work, [0, 1, 2, 3, None]))
    for seed, tokens in alone.items():
        assert runs[seed] == [tokens] * 3


def test_each_question_is_sampled_as_if_it_were_alone(make_tiny) -> None:
    adapter = make_tiny()
    questions = ["How long is it?", "Where does it end?"]
    arguments = {**SAMPLING, "seed": 5}
    together = adapter.process_request(Request(CONTEXT, questions), arguments).details
    alone = [first(adapter, arguments, Request(CONTEXT, question)) for question in questions]
    assert [item.token_ids for item in together] == [item.token_ids for item in alone]


@pytest.mark.parametrize("config", [None, CONFIG])
def test_several_sequences(make_tiny, config) -> None:
    adapter = make_tiny(config, sparse_by_default=config is not None)
    arguments = {**SAMPLING, "num_return_sequences": 3, "seed": 6}
    response = adapter.process_request(REQUEST, arguments)
    detail = response.details[0]
    rows = [detail.token_ids, *(item.token_ids for item in detail.alternatives)]
    assert len(set(rows)) == 3
    assert all(isinstance(item, Alternative) for item in detail.alternatives)
    assert [item.text for item in detail.alternatives] == [
        adapter.tokenizer.decode(row) for row in rows[1:]
    ]
    assert response.responses == adapter.tokenizer.decode(rows[0])
    if config is None:
        del arguments["seed"]
        assert [list(row) for row in rows] == plain(adapter, 6, **arguments)


def test_sequences_end_each_at_its_own_end(make_tiny) -> None:
    """What `generate` pads a row with, while others go on, is no token of its answer."""
    adapter = make_tiny()
    arguments = {**SAMPLING, "num_return_sequences": 6, "seed": 7, "max_new_tokens": 12}
    rows = [first(adapter, arguments)]
    free = [rows[0].token_ids, *(item.token_ids for item in rows[0].alternatives)]
    end = free[0][3]  # ends one row here, others later or not at all
    stop = adapter.tokenizer.decode(free[1][4])
    detail = first(adapter, {**arguments, "eos_token_id": end, "stop_strings": [stop]})
    ended = [detail, *detail.alternatives]
    assert detail.token_ids == free[0][:4]
    assert ended[1].token_ids == free[1][:5]
    for item, row in zip(ended, free, strict=True):
        assert item.token_ids == row[: len(item.token_ids)]
        is_cut = len(item.token_ids) < 12
        assert item.finish_reason == ("stop" if is_cut else "length")
    assert any(item.finish_reason == "length" for item in ended)


def test_end_of_sequence_from_the_first_token_on(make_tiny) -> None:
    adapter = make_tiny()
    tokens = first(adapter, {"max_new_tokens": 6}).token_ids
    for count in (1, 3):
        end = tokens[count - 1]
        for ends in (end, [0, end]):
            detail = first(adapter, {"max_new_tokens": 6, "eos_token_id": ends})
            assert detail.token_ids == tokens[:count]
            assert detail.finish_reason == "stop"
    # At the very last token it is an end, too.
    detail = first(adapter, {"max_new_tokens": 3, "eos_token_id": tokens[2]})
    assert (detail.new_tokens, detail.finish_reason) == (3, "stop")


def test_end_of_sequence_of_the_model(make_tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = make_tiny()
    token = first(adapter, {"max_new_tokens": 1}).token_ids[0]
    monkeypatch.setattr(adapter.model.generation_config, "eos_token_id", [0, token])
    detail = first(adapter, {"max_new_tokens": 6})
    assert (detail.token_ids, detail.finish_reason) == ((token,), "stop")
    response = adapter.process_request(REQUEST, {"max_new_tokens": 6})
    assert response.responses == adapter.tokenizer.decode(token, skip_special_tokens=True)


def test_stop_strings(make_tiny) -> None:
    adapter = make_tiny()
    free = first(adapter, {"max_new_tokens": 6})
    stop = adapter.tokenizer.decode(free.token_ids[2])
    for stops in (stop, ["not there", stop]):
        detail = first(adapter, {"max_new_tokens": 6, "stop_strings": stops})
        assert detail.token_ids == free.token_ids[:3]
        assert detail.finish_reason == "stop"


def test_nothing_for_no_tokens(make_tiny) -> None:
    adapter = make_tiny()
    streamer = TextIteratorStreamer(adapter.tokenizer, timeout=10)
    response = adapter.process_request(REQUEST, {"max_new_tokens": 0, "streamer": streamer})
    assert response.responses == ""
    detail = response.details[0]
    assert (detail.token_ids, detail.finish_reason) == ((), "length")
    assert detail.time_to_first_token_s is None
    assert "".join(streamer) == ""


def test_a_streamer_gets_the_tokens_as_they_come(make_tiny) -> None:
    adapter = make_tiny()
    came: list[int] = []

    class Streamer:
        def put(self, value: torch.Tensor) -> None:
            came.extend(value.flatten().tolist())

        def end(self) -> None:
            came.append(-1)

    request = Request(CONTEXT, ["How long is it?", "Where does it end?"])
    details = adapter.process_request(
        request, {"max_new_tokens": 4, "streamer": Streamer()}
    ).details
    expected: list[int] = []
    for detail, question in zip(details, request.questions, strict=True):
        prompt = adapter.tokenizer.encode(CONTEXT) + adapter.tokenizer.encode(question)
        expected += [*prompt, *detail.token_ids, -1]
    assert came == expected


class StopsAfter(StoppingCriteria):
    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids: torch.Tensor, scores, **kwargs) -> torch.Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


def test_stopping_criteria_and_a_generation_config(make_tiny, caplog) -> None:
    adapter = make_tiny()
    free = first(adapter, {"max_new_tokens": 8})
    stopping = [StopsAfter(free.prompt_tokens + 2)]
    detail = first(adapter, {"max_new_tokens": 8, "stopping_criteria": stopping})
    assert (detail.token_ids, detail.finish_reason) == (free.token_ids[:2], "stop")
    config = GenerationConfig(max_new_tokens=5, eos_token_id=free.token_ids[3])
    detail = first(adapter, {"generation_config": config})
    assert (detail.token_ids, detail.finish_reason) == (free.token_ids[:4], "stop")
    assert first(adapter, {"generation_config": config, "max_new_tokens": 2}).new_tokens == 2
    assert config.max_new_tokens == 5
    assert "deprecated" not in caplog.text


def test_beams_are_dense(make_tiny) -> None:
    adapter = make_tiny(CONFIG)
    arguments = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 5}
    detail = first(adapter, arguments)
    rows = [detail.token_ids, *(item.token_ids for item in detail.alternatives)]
    assert [list(row) for row in rows] == plain(adapter, **arguments, do_sample=False)
    with adapter.enable_sparse_mode(), pytest.raises(ValueError, match="'num_beams'.=3 cannot"):
        first(adapter, arguments)


@pytest.mark.parametrize(
    ("generation", "message"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens.*-1"),
        ({"max_new_tokens": 1.5}, "max_new_tokens.*1.5"),
        ({"num_return_sequences": 2}, "num_return_sequences=2 needs do_sample=True"),
        ({"num_return_sequences": 0}, "num_return_sequences.*0"),
        (
            {"num_return_sequences": 2, "do_sample": True, "streamer": object()},
            "a streamer takes one sequence",
        ),
        ({"past_key_values": None}, "'past_key_values'.*own"),
        ({"no_such_argument": 1}, "no_such_argument"),
    ],
)
def test_bad_arguments(make_tiny, generation: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        first(make_tiny(), generation)


def test_what_would_be_wrong_is_refused(make_tiny) -> None:
    adapter = make_tiny(CONFIG, sparse_by_default=True)
    for name, value in [("prompt_lookup_num_tokens", 3), ("guidance_scale", 1.5)]:
        with pytest.raises(ValueError, match=f"'{name}'.*cannot run in sparse mode"):
            first(adapter, {name: value})
    with pytest.raises(ValueError, match="return_logits.*beam"):
        first(make_tiny(), {"num_beams": 2}, return_logits=True)
