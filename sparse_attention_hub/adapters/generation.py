"""`generation_kwargs`: what both adapters check the same way."""

from __future__ import annotations

from typing import Any

from sparse_attention_hub.adapters.base import DEFAULT_MAX_NEW_TOKENS


def checked_generation_arguments(generation_kwargs: dict[str, Any] | None) -> dict[str, Any]:
    """Arguments of `generate`, greedy and 50 tokens unless they say otherwise.

    Args:
        generation_kwargs: In transformers' names. What its `generation_config` says, if there is
            one, comes before the defaults.

    Raises:
        ValueError: `max_new_tokens` is negative or no integer, or several sequences are asked for
            that would all be the same, or cannot be streamed.
    """
    given = dict(generation_kwargs or {})
    config = given.get("generation_config")
    defaults = {"max_new_tokens": DEFAULT_MAX_NEW_TOKENS, "do_sample": False}
    for name, default in defaults.items():
        configured = getattr(config, name, None)
        given.setdefault(name, default if configured is None else configured)
    count = given["max_new_tokens"]
    if isinstance(count, bool) or not isinstance(count, int) or count < 0:
        raise ValueError(f"max_new_tokens must be an integer >= 0, got {count!r}")
    sequences = number_of_sequences(given)
    if isinstance(sequences, bool) or not isinstance(sequences, int) or sequences < 1:
        raise ValueError(f"num_return_sequences must be an integer >= 1, got {sequences!r}")
    if sequences > 1:
        if not given["do_sample"] and sequences > number_of_beams(given):
            raise ValueError(
                f"num_return_sequences={sequences} needs do_sample=True (or as many beams): greedy "
                "answers are all the same"
            )
        if given.get("streamer") is not None:
            raise ValueError(f"a streamer takes one sequence, got num_return_sequences={sequences}")
    return given


def number_of_sequences(arguments: dict[str, Any]) -> Any:
    """How many answers to a question are asked for."""
    count = argument_of(arguments, "num_return_sequences")
    return 1 if count is None else count


def number_of_beams(arguments: dict[str, Any]) -> int:
    """How many beams are searched; 1 = none."""
    return argument_of(arguments, "num_beams") or 1


def argument_of(arguments: dict[str, Any], name: str) -> Any:
    """The value as given, or as the `generation_config` that was given has it; else None."""
    return arguments.get(name, getattr(arguments.get("generation_config"), name, None))


def mean_gap(times: list[float]) -> float | None:
    """Seconds between tokens, of the times at which they came; None for fewer than two."""
    return (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else None
