"""`request_kwargs`, what a response carries, and that nothing is printed."""

import io
import math

import pytest
from tqdm import tqdm

from sparse_attention_hub import Request, RequestResponse
from sparse_attention_hub.adapters import AnswerDetails, progress
from sparse_attention_hub.sparse_attention import (
    LocalMaskerConfig,
    ResearchAttentionConfig,
    SinkMaskerConfig,
)

CONFIG = ResearchAttentionConfig([SinkMaskerConfig(2), LocalMaskerConfig(8)])
CONTEXT = "The river Foo is 312 km long. It rises in the Bar hills and ends in lake Baz. "
REQUEST = Request(CONTEXT, ["How long is it?", "Where does it rise?"], "Answer:")
GENERATION = {"max_new_tokens": 4}


def test_a_context_that_is_too_long_is_an_error_or_cut_at_its_end(make_tiny) -> None:
    adapter = make_tiny()
    ids = adapter.tokenizer.encode(CONTEXT)
    with pytest.raises(ValueError, match=f"has {len(ids)} tokens, max_context_length is 7"):
        adapter.process_request(REQUEST, GENERATION, {"max_context_length": 7})
    cut = adapter.process_request(
        REQUEST, GENERATION, {"max_context_length": 7, "truncate_context": True}
    )
    head = Request(adapter.tokenizer.decode(ids[:7]), REQUEST.questions, "Answer:")
    assert cut == adapter.process_request(head, GENERATION)
    assert [item.context_tokens for item in cut.details] == [7, 7]
    whole = adapter.process_request(
        REQUEST, GENERATION, {"max_context_length": len(ids), "truncate_context": True}
    )
    assert whole == adapter.process_request(REQUEST, GENERATION) != cut


def test_answers_begin_with_the_prefix_unless_they_should_not(make_tiny) -> None:
    adapter = make_tiny()
    full = adapter.process_request(REQUEST, GENERATION)
    bare = adapter.process_request(REQUEST, GENERATION, {"include_answer_prefix": False})
    assert full.responses == ["Answer:" + text for text in bare.responses]
    assert all(bare.responses)
    # The model has read the prefix either way.
    other = Request(CONTEXT, REQUEST.questions)
    assert bare.responses != adapter.process_request(other, GENERATION).responses


def test_what_a_response_carries(make_tiny) -> None:
    adapter = make_tiny(CONFIG, sparse_by_default=True)
    response = adapter.process_request(REQUEST, {"max_new_tokens": 9})
    context = len(adapter.tokenizer.encode(CONTEXT))
    for detail, question in zip(response.details, REQUEST.questions, strict=True):
        assert detail.context_tokens == context
        assert detail.prompt_tokens == context + len(adapter.tokenizer.encode(question + "Answer:"))
        assert detail.new_tokens == len(detail.token_ids) == 9
        assert detail.finish_reason == "length"
        between = detail.time_per_output_token_s * (detail.new_tokens - 1)
        assert 0 < detail.time_to_first_token_s < detail.total_time_s
        assert detail.time_to_first_token_s + between <= detail.total_time_s
    read = sum(item.read_keys for item in response.details)
    visible = sum(item.visible_keys for item in response.details)
    assert math.isclose(response.density, read / visible)


def test_a_response_is_its_texts_to_who_compares_it() -> None:
    detail = AnswerDetails("sparse", (1, 2), 5, 3, 0.5, 10, 20, 0.1, 0.2, "stop")
    assert RequestResponse("a") == RequestResponse("a", (detail,)) != RequestResponse("b")
    assert RequestResponse(["a"]).responses == ["a"]
    assert RequestResponse("a").details == ()
    assert (RequestResponse([]).mode, RequestResponse([]).density) == (None, None)
    assert RequestResponse("a", (detail,)).density == 0.5


def test_forms_of_questions(make_tiny) -> None:
    adapter = make_tiny()
    assert isinstance(adapter.process_request(Request("a", "b"), GENERATION).responses, str)
    assert len(adapter.process_request(Request("a", ["b"]), GENERATION).responses) == 1
    assert adapter.process_request(Request("a", []), GENERATION) == RequestResponse([])
    assert adapter.process_request(Request("", "b"), GENERATION).details[0].context_tokens == 0


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def bars(monkeypatch: pytest.MonkeyPatch) -> list[tuple[tqdm, Terminal]]:
    """The progress bars of a test, each with the terminal that it writes on."""
    made: list[tuple[tqdm, Terminal]] = []

    def bar(**kwargs) -> tqdm:
        terminal = Terminal()
        made.append((tqdm(file=terminal, mininterval=0, **kwargs), terminal))
        return made[-1][0]

    monkeypatch.setattr(progress, "tqdm", bar)
    return made


def shown(bars: list[tuple[tqdm, Terminal]]) -> str:
    """What the latest bar wrote."""
    return bars[-1][1].getvalue()


def test_a_progress_bar_counts_the_tokens_of_all_answers(make_tiny, bars: list) -> None:
    adapter = make_tiny()
    details = adapter.process_request(REQUEST, GENERATION, {"show_progress": True}).details
    prompt = details[0].prompt_tokens + details[1].prompt_tokens - details[0].context_tokens
    assert (bars[0][0].n, bars[0][0].total) == (8, 8)
    assert f"reading {prompt} tokens" in shown(bars)
    assert "answering: 100%" in shown(bars)


def test_an_answer_that_ends_early_shortens_the_bar(make_tiny, bars: list) -> None:
    adapter = make_tiny()
    token = adapter.process_request(REQUEST, GENERATION).details[0].token_ids[1]
    arguments = {**GENERATION, "eos_token_id": token}
    details = adapter.process_request(REQUEST, arguments, {"show_progress": True}).details
    expected = sum(item.new_tokens for item in details)
    assert expected < 8
    assert (bars[-1][0].n, bars[-1][0].total) == (expected, expected)


def test_the_longest_of_several_sequences_counts(make_tiny, bars: list) -> None:
    arguments = {"max_new_tokens": 9, "do_sample": True, "num_return_sequences": 4, "seed": 1}
    adapter = make_tiny()
    end = adapter.process_request(REQUEST, arguments).details[0].token_ids[2]
    arguments["eos_token_id"] = end
    response = adapter.process_request(REQUEST, arguments, {"show_progress": True})
    assert response.details[0].new_tokens == 3
    assert (bars[-1][0].n, bars[-1][0].total) == (18, 18)


def test_no_bar_unless_asked_or_long(make_tiny, bars: list, monkeypatch) -> None:
    adapter = make_tiny()
    for options in ({}, {"show_progress": False}):
        adapter.process_request(REQUEST, GENERATION, options)
        assert shown(bars) == ""
    monkeypatch.setattr(progress, "LONG_ANSWER_TOKENS", 7)
    adapter.process_request(REQUEST, GENERATION)
    assert "answering" in shown(bars)
    adapter.process_request(REQUEST, GENERATION, {"show_progress": False})
    assert shown(bars) == ""
    monkeypatch.setattr(progress, "LONG_ANSWER_TOKENS", 100)
    monkeypatch.setattr(progress, "LONG_PROMPT_TOKENS", 20)
    adapter.process_request(REQUEST, GENERATION)
    assert "answering" in shown(bars)


def test_nothing_is_printed(make_tiny, capsys: pytest.CaptureFixture) -> None:
    adapter = make_tiny(CONFIG, model_kwargs={})  # loads one of its own
    adapter.process_request(REQUEST, GENERATION)
    with adapter.enable_sparse_mode():
        adapter.process_request(REQUEST, GENERATION, {"show_progress": True})
    adapter.close()
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "answering" in captured.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_context_length": 0}, "max_context_length.*>= 1, got 0"),
        ({"show_progress": "yes"}, "show_progress.*'yes'"),
        ({"sparse_context": 1}, "sparse_context.*got 1"),
        ({"max_contxt": 3}, "'max_contxt'.*not known; allowed: max_context_length, truncate"),
    ],
)
def test_bad_options(make_tiny, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_tiny().process_request(REQUEST, GENERATION, options)
