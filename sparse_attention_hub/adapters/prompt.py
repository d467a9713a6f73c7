"""From a `Request` to tokens: the same ones for every adapter.

A prompt is `context part ‖ question part`. The context part is the chat template's head and the
context; the question part is the question, the template's tail and the answer prefix. The two are
tokenised separately, so that the context's tokens are the same for every question and can be
prefilled once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sparse_attention_hub.adapters.base import INT_MAX, Mode, Request, questions_of

_REQUEST_KWARGS = (
    "max_context_length",
    "truncate_context",
    "include_answer_prefix",
    "return_logits",
    "sparse_context",
    "show_progress",
)

_SENTENCEPIECE_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"


@dataclass(frozen=True)
class RequestOptions:
    """`request_kwargs`, checked.

    Attributes:
        max_context_length: Most tokens of the context part.
        truncate_context: Whether a longer one is cut to its first tokens, or an error.
        include_answer_prefix: Whether answers begin with the answer prefix.
        return_logits: Whether details carry logits (in-process adapter only).
        sparse_context: Whether the context attends sparsely too (sparse mode only).
        show_progress: Whether there is a progress bar; None = for long requests, on a terminal.
    """

    max_context_length: int = INT_MAX
    truncate_context: bool = False
    include_answer_prefix: bool = True
    return_logits: bool = False
    sparse_context: bool = False
    show_progress: bool | None = None

    @classmethod
    def parse(cls, request_kwargs: dict[str, Any] | None) -> RequestOptions:
        """Reads the dictionary.

        Raises:
            ValueError: Names the option, its value and what is allowed.
        """
        given = dict(request_kwargs or {})
        for name in given:
            if name not in _REQUEST_KWARGS:
                raise ValueError(
                    f"request_kwargs[{name!r}] is not known; allowed: {', '.join(_REQUEST_KWARGS)}"
                )
        options = cls(**given)
        length = options.max_context_length
        if isinstance(length, bool) or not isinstance(length, int) or length < 1:
            raise ValueError(
                f"request_kwargs['max_context_length'] must be an integer >= 1, got {length!r}"
            )
        for name in _REQUEST_KWARGS[1:]:
            value = getattr(options, name)
            if not isinstance(value, bool) and (name, value) != ("show_progress", None):
                raise ValueError(f"request_kwargs[{name!r}] must be True or False, got {value!r}")
        return options

    def check_mode(self, mode: Mode) -> None:
        """Refuses options that mean nothing in a mode.

        Raises:
            ValueError: A sparse context in dense mode.
        """
        if self.sparse_context and mode == "dense":
            raise ValueError(
                "request_kwargs['sparse_context']=True needs sparse mode: call inside `with "
                "adapter.enable_sparse_mode():`"
            )


@dataclass(frozen=True)
class TokenizedRequest:
    """A request in tokens.

    Attributes:
        context_ids: Of the context part.
        question_ids: Of each question part.
    """

    context_ids: list[int]
    question_ids: list[list[int]]

    @property
    def num_tokens(self) -> int:
        """Of the context part and all question parts."""
        return len(self.context_ids) + sum(len(ids) for ids in self.question_ids)


def tokenize_request(tokenizer: Any, request: Request, options: RequestOptions) -> TokenizedRequest:
    """Tokenises a request.

    The context part is tokenised as transformers tokenises a rendered chat template: the
    template writes all special tokens itself. Without a template, the tokenizer's
    beginning-of-sequence token comes first, once. What a template trims is trimmed.

    Args:
        tokenizer: A transformers tokenizer.
        request: Context, questions and answer prefix.
        options: Limits of the context.

    Raises:
        ValueError: The chat template changes the context or a question or repeats them, the
            context is too long, or a question part is empty.
    """
    if tokenizer.chat_template:
        head, tail = _split_template(tokenizer, request.context)
        context_ids = tokenizer.encode(head, add_special_tokens=False)
    else:
        head, tail = request.context, ""
        context_ids = _encode_with_bos(tokenizer, head)
    if len(context_ids) > options.max_context_length:
        if not options.truncate_context:
            raise ValueError(
                f"the context has {len(context_ids)} tokens, max_context_length is "
                f"{options.max_context_length}; request_kwargs['truncate_context']=True keeps the "
                "first ones"
            )
        context_ids = context_ids[: options.max_context_length]
    question_ids = []
    for question in questions_of(request):
        if tokenizer.chat_template:
            question = _as_rendered(tokenizer, request.context, question, head, tail)
        ids = _encode_continuation(tokenizer, question + tail + request.answer_prefix)
        if not ids:
            raise ValueError(f"the question {question!r} gives no tokens")
        question_ids.append(ids)
    return TokenizedRequest(context_ids, question_ids)


def _split_template(tokenizer: Any, context: str) -> tuple[str, str]:
    """The chat template around one user message, cut where the question belongs."""
    separator, number = "<question-0>", 0
    while separator in context:
        number += 1
        separator = f"<question-{number}>"
    parts = _render(tokenizer, context + separator).split(separator)
    if len(parts) != 2:
        raise ValueError(
            f"the chat template writes the user's message {len(parts) - 1} times; adapters need it "
            "exactly once, to put questions after the context"
        )
    head, tail = parts
    # Templates may trim a message; any other change would answer about another text.
    if not head.endswith(context.lstrip()):
        raise ValueError("the chat template changes the text of the user's message")
    return head, tail


def _as_rendered(tokenizer: Any, context: str, question: str, head: str, tail: str) -> str:
    """A question as the chat template writes it after the context: trimmed at its end, or not."""
    rendered = _render(tokenizer, context + question)
    for text in (question, question.rstrip()):
        if rendered == head + text + tail:
            return text
    if not question.strip():
        return question  # a template that trims would reach into the context
    raise ValueError(f"the chat template changes the text of the question {question!r}")


def _render(tokenizer: Any, content: str) -> str:
    message = [{"role": "user", "content": content}]
    rendered: str = tokenizer.apply_chat_template(
        message, tokenize=False, add_generation_prompt=True
    )
    return rendered


def _encode_continuation(tokenizer: Any, text: str) -> list[int]:
    """Tokens of a text that follows another one.

    SentencePiece tokenizers put a space before a text, which does not belong in the middle of a
    prompt; here it goes before a line break, and both are cut off.
    """
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    if ids and tokenizer.convert_ids_to_tokens(ids[0]).startswith(_SENTENCEPIECE_SPACE):
        before: list[int] = tokenizer.encode("\n", add_special_tokens=False)
        both: list[int] = tokenizer.encode("\n" + text, add_special_tokens=False)
        if both[: len(before)] == before:
            return both[len(before) :]
    return ids


def _encode_with_bos(tokenizer: Any, text: str) -> list[int]:
    plain: list[int] = tokenizer.encode(text, add_special_tokens=False)
    special: list[int] = tokenizer.encode(text, add_special_tokens=True)
    bos = tokenizer.bos_token_id
    begins_with_bos = bos is not None and special[:1] == [bos]
    return [bos, *plain] if begins_with_bos and plain[:1] != [bos] else plain
