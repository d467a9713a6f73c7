"""What a request may hold."""

import pytest

from sparse_attention_hub import Request
from sparse_attention_hub.adapters.base import questions_of


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        (Request("a", None), "questions must be a str or a list of them, got None"),
        (Request("a", [None]), r"questions must be a str or a list of them, got \[None\]"),
        (Request("a", "b", None), "answer_prefix must be a str, got None"),
        (Request(None, "b"), "context must be a str, got None"),
    ],
)
def test_what_is_no_text_is_named(request_: Request, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        questions_of(request_)


def test_one_question_and_several() -> None:
    assert questions_of(Request("a", "b")) == ["b"]
    assert questions_of(Request("a", ["b", "c"])) == ["b", "c"]
    assert questions_of(Request("a", [])) == []
