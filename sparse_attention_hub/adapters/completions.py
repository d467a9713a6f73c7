"""Generation through the OpenAI completions API: arguments in transformers' names, tokens back."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import openai

from sparse_attention_hub.adapters.generation import (
    checked_generation_arguments,
    number_of_sequences,
)
from sparse_attention_hub.adapters.utils.exceptions import ServerRequestError

_OPENAI_NAMES = {
    "max_new_tokens": "max_tokens",
    "num_return_sequences": "n",
    "seed": "seed",
    "stop_strings": "stop",
    "temperature": "temperature",
    "top_p": "top_p",
}
_VLLM_NAMES = {
    "min_new_tokens": "min_tokens",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "top_k": "top_k",
}
_OTHER_NAMES = ("do_sample", "eos_token_id", "pad_token_id", "streamer")
"""Those that are no plain copy: see `completion_arguments`."""


def completion_arguments(generation_kwargs: dict[str, Any] | None) -> dict[str, Any]:
    """Arguments of the completions API: greedy and 50 tokens unless they say otherwise.

    As in `generate`, None counts as not given, and `eos_token_id` takes the place of the model's
    own ends. `pad_token_id` changes nothing: a server pads nothing.

    Args:
        generation_kwargs: In transformers' names.

    Raises:
        ValueError: See `checked_generation_arguments`; or an argument has no counterpart.
    """
    allowed = sorted({*_OPENAI_NAMES, *_VLLM_NAMES, *_OTHER_NAMES})
    for name in generation_kwargs or {}:
        if name not in allowed:
            raise ValueError(
                f"generation_kwargs[{name!r}] cannot be sent to a server; allowed: "
                + ", ".join(allowed)
            )
    checked = checked_generation_arguments(generation_kwargs)
    given = {name: value for name, value in checked.items() if value is not None}
    if not given["do_sample"]:
        given["temperature"] = 0.0
    extra = {_VLLM_NAMES[name]: value for name, value in given.items() if name in _VLLM_NAMES}
    if "eos_token_id" in given:
        ends = given["eos_token_id"]
        extra |= {"ignore_eos": True, "stop_token_ids": ends if isinstance(ends, list) else [ends]}
    # The tokens of a stop string are part of the answer, as in `generate`.
    extra |= {"return_token_ids": True, "include_stop_str_in_output": True}
    plain = {_OPENAI_NAMES[name]: value for name, value in given.items() if name in _OPENAI_NAMES}
    return {**plain, "n": number_of_sequences(checked), "extra_body": extra}


@dataclass
class GeneratedRow:
    """One generated sequence.

    Attributes:
        token_ids: An end-of-sequence token included.
        finish_reason: "stop" or "length"; None before the end.
    """

    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None


@dataclass
class Completion:
    """What came for one prompt.

    Attributes:
        rows: One per sequence asked for.
        times: When each token of the first row came, by `time.perf_counter`.
    """

    rows: list[GeneratedRow]
    times: list[float] = field(default_factory=list)


class Abandoned(Exception):
    """Another question of the same request failed, so that this answer is of no use."""


class AnswerBrokeOff(Exception):
    """The server closed an answer that has not ended."""


def stream_completion(
    client: openai.OpenAI,
    arguments: Mapping[str, Any],
    on_tokens: Callable[[list[int]], None],
    is_abandoned: threading.Event,
) -> Completion:
    """Runs one prompt to its end.

    Args:
        client: Of the server.
        arguments: Of `client.completions.create`, without `stream`.
        on_tokens: Called with the tokens of the first row as they come.
        is_abandoned: Ends the request, here and on the server, at its next token.

    Raises:
        Abandoned: See there.
        AnswerBrokeOff: See there.
        ServerRequestError: The server does not send token ids.
        openai.OpenAIError: See `translated_errors`.
    """
    completion = Completion([GeneratedRow() for _ in range(arguments["n"])])
    with client.completions.create(**arguments, stream=True) as stream:
        for chunk in stream:
            if is_abandoned.is_set():
                raise Abandoned
            for choice in chunk.choices:
                token_ids = getattr(choice, "token_ids", None)
                if token_ids is None and choice.text:
                    raise ServerRequestError(
                        "the server sends text without token ids", "it seems not to be vLLM"
                    )
                row = completion.rows[choice.index]
                row.token_ids += token_ids or []
                row.finish_reason = choice.finish_reason or row.finish_reason
                if choice.index == 0 and token_ids:
                    completion.times += [time.perf_counter()] * len(token_ids)
                    on_tokens(token_ids)
    for row in completion.rows:
        if row.finish_reason not in ("stop", "length"):
            raise AnswerBrokeOff(f"the answer broke off, finish reason {row.finish_reason}")
    return completion
