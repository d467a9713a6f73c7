"""One question to a transformers model whose KV cache already holds the context."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from transformers import DynamicCache, StoppingCriteria, StoppingCriteriaList
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from sparse_attention_hub.adapters.attention_session import AttentionSession
from sparse_attention_hub.adapters.base import Alternative, AnswerDetails
from sparse_attention_hub.adapters.generation import (
    argument_of,
    checked_generation_arguments,
    mean_gap,
    number_of_beams,
    number_of_sequences,
)

_OWN_ARGUMENTS = (
    "attention_mask",
    "input_ids",
    "inputs",
    "output_logits",
    "past_key_values",
    "return_dict_in_generate",
    "use_cache",
)
"""Arguments of `generate` that the adapter gives itself."""

_NOT_SPARSE = (
    "assistant_early_exit",
    "assistant_model",
    "guidance_scale",
    "num_beams",
    "prompt_lookup_num_tokens",
)
"""Ways to generate that reorder or shorten the cache, which maskers keep labels of, or that have a
second one."""

_SAMPLING = threading.RLock()
"""Held by who samples: torch's generator is one for all threads."""


def generate_arguments(
    generation_kwargs: dict[str, Any] | None, is_sparse: bool, return_logits: bool
) -> dict[str, Any]:
    """Arguments of `model.generate`.

    Raises:
        ValueError: See `checked_generation_arguments`; or an argument is the adapter's own, or
            cannot run sparsely, or logits of a beam search are asked for.
    """
    arguments = checked_generation_arguments(generation_kwargs)
    for name in _OWN_ARGUMENTS:
        if name in arguments:
            raise ValueError(f"generation_kwargs[{name!r}] is the adapter's own to give")
    for name in _NOT_SPARSE:
        value = argument_of(arguments, name)
        if is_sparse and value not in (None, 1):
            raise ValueError(
                f"generation_kwargs[{name!r}]={value!r} cannot run in sparse mode: it changes the "
                "order or length of the KV cache, or has a second one; sampling can"
            )
    if return_logits and number_of_beams(arguments) > 1:
        raise ValueError(
            "request_kwargs['return_logits'] is not for beam search: beams swap places"
        )
    return arguments


class _TokenClock(StoppingCriteria):
    """Notes when each token was there; never stops anything."""

    def __init__(self, on_token: Callable[[], None]) -> None:
        self.times: list[float] = []
        self._on_token = on_token

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.times.append(time.perf_counter())
        self._on_token()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def answer(
    model: Any,
    tokenizer: Any,
    context_ids: list[int],
    question_ids: list[int],
    context_cache: DynamicCache,
    arguments: dict[str, Any],
    session: AttentionSession | None,
    *,
    started: float,
    return_logits: bool,
    on_token: Callable[[], None],
) -> AnswerDetails:
    """Generates the answer to one question.

    Args:
        model: Whose attention runs in `session`, if there is one.
        tokenizer: Of the model.
        context_ids: Tokens in the cache.
        question_ids: Tokens after them.
        context_cache: Not changed.
        arguments: Of `generate_arguments`; a `seed` among them makes sampling repeatable.
        session: Counts what was read; None = dense.
        started: When the clock of this answer started, by `time.perf_counter`.
        return_logits: Whether the details have them.
        on_token: Called for each generated token.
    """
    arguments = dict(arguments)
    max_new_tokens, seed = arguments["max_new_tokens"], arguments.pop("seed", None)
    streamer = arguments.get("streamer")
    prompt = [*context_ids, *question_ids]
    clock = _TokenClock(on_token)
    rows: list[tuple[int, ...]] = [()]
    logits = None
    if max_new_tokens > 0:
        ids = torch.tensor([prompt], device=model.device)
        cache = copy_cache(context_cache)
        # `generate` repeats its inputs for several sequences, but not a cache that it is given.
        copies = max(number_of_beams(arguments), number_of_sequences(arguments))
        if copies > 1:
            cache.batch_repeat_interleave(copies)
        criteria = [clock, *(arguments.get("stopping_criteria") or [])]
        with _sampling(seed, model.device) if arguments["do_sample"] else nullcontext():
            output = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                past_key_values=cache,
                **_one_configuration(
                    {
                        "pad_token_id": tokenizer.pad_token_id,
                        "tokenizer": tokenizer,
                        **arguments,
                        "stopping_criteria": StoppingCriteriaList(criteria),
                        "return_dict_in_generate": True,
                        "output_logits": return_logits,
                    }
                ),
            )
        rows = [tuple(row.tolist()) for row in output.sequences[:, len(prompt) :]]
        if len(rows) > 1:
            rows = [_without_padding(model, tokenizer, row, arguments) for row in rows]
        if return_logits:
            logits = torch.stack(output.logits, dim=1)[0].float()
    elif streamer is not None:
        streamer.end()  # who reads from it would wait for ever
    sequences = [_sequence(model, tokenizer, row, arguments) for row in rows]
    return AnswerDetails(
        mode="dense" if session is None else "sparse",
        token_ids=rows[0],
        prompt_tokens=len(prompt),
        context_tokens=len(context_ids),
        density=session.density if session else 1.0,
        read_keys=session.read_keys if session else None,
        visible_keys=session.visible_keys if session else None,
        time_to_first_token_s=clock.times[0] - started if clock.times else None,
        time_per_output_token_s=mean_gap(clock.times),
        finish_reason=sequences[0].finish_reason,
        total_time_s=time.perf_counter() - started,
        alternatives=tuple(sequences[1:]),
        logits=logits,
    )


def copy_cache(cache: DynamicCache) -> DynamicCache:
    """A cache that can grow without changing the original.

    These layers concatenate and never write into their tensors, so the tensors can be shared;
    other kinds of layers are copied whole.
    """
    if any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers):
        return copy.deepcopy(cache)
    copied = copy.copy(cache)
    copied.layers = [copy.copy(layer) for layer in cache.layers]
    return copied


@contextmanager
def _sampling(seed: int | None, device: torch.device) -> Iterator[None]:
    """A `with` block that draws random numbers: alone, and repeatably if there is a seed.

    After a seeded block the generator is as if nothing had been drawn.
    """
    with _SAMPLING:
        if seed is None:
            yield
            return
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            yield


def _one_configuration(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same, with what belongs to a given `generation_config` in it: `generate` wants one."""
    config = copy.deepcopy(arguments.get("generation_config"))
    if config is None:
        return arguments
    others = {name: value for name, value in arguments.items() if name != "generation_config"}
    return {**config.update(**others), "generation_config": config}


def _end_tokens(model: Any, arguments: dict[str, Any]) -> list[int]:
    given = argument_of(arguments, "eos_token_id")
    ends = model.generation_config.eos_token_id if given is None else given
    return list(ends) if isinstance(ends, (list, tuple)) else [ends]


def _stop_strings(arguments: dict[str, Any]) -> list[str]:
    stops = argument_of(arguments, "stop_strings") or []
    return [stops] if isinstance(stops, str) else list(stops)


def _without_padding(
    model: Any, tokenizer: Any, row: tuple[int, ...], arguments: dict[str, Any]
) -> tuple[int, ...]:
    """A row without what follows its end while other rows go on."""
    ends, stops = _end_tokens(model, arguments), _stop_strings(arguments)
    for index, token in enumerate(row):
        so_far = row[: index + 1]
        if token in ends or (stops and _has_any(tokenizer, so_far, stops)):
            return so_far
    return row


def _has_any(tokenizer: Any, row: tuple[int, ...], stops: list[str]) -> bool:
    text = tokenizer.decode(row, skip_special_tokens=True)
    return any(stop in text for stop in stops)


def _sequence(
    model: Any, tokenizer: Any, row: tuple[int, ...], arguments: dict[str, Any]
) -> Alternative:
    """One generated row, with its text and the reason for its end."""
    stopped = (
        len(row) < arguments["max_new_tokens"]
        or (row and row[-1] in _end_tokens(model, arguments))
        or _has_any(tokenizer, row, _stop_strings(arguments))
    )
    text = tokenizer.decode(row, skip_special_tokens=True)
    return Alternative(text, row, "stop" if stopped and row else "length")
