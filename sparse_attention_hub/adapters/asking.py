"""In which order the questions of a request go to a server."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import Any, TypeVar

import torch

MAX_CONCURRENT_QUESTIONS = 32

Answer = TypeVar("Answer")
Ask = Callable[[list[int], Callable[[list[int]], None]], Answer]
"""Answers a question, in tokens, and calls back with the answer's tokens as they come."""


def ask_in_parallel(
    ask: Ask[Answer], questions: list[list[int]], is_abandoned: threading.Event
) -> list[Answer]:
    """Asks the first question and, once its answer begins, all others together.

    By then the first one has filled the server's prefix cache with what they share.

    Args:
        ask: Called in several threads.
        questions: In tokens.
        is_abandoned: Set when an error (also of this thread: Ctrl-C) makes the answers useless.

    Returns:
        The answers, in order.

    Raises:
        Exception: The first one of `ask`, when all calls have ended.
    """
    if not questions:
        return []
    begins = threading.Event()
    with ThreadPoolExecutor(min(MAX_CONCURRENT_QUESTIONS, len(questions))) as pool:
        try:
            first = pool.submit(ask, questions[0], lambda _: begins.set())
            first.add_done_callback(lambda _: begins.set())
            begins.wait()
            if first.done():
                first.result()  # after an error the others need not be asked
            others = [pool.submit(ask, question, lambda _: None) for question in questions[1:]]
            done, _ = wait([first, *others], return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()  # raises what a question raised
            return [future.result() for future in (first, *others)]
        except BaseException:
            is_abandoned.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def stream_one_by_one(
    ask: Ask[Answer], context: list[int], questions: list[list[int]], streamer: Any
) -> list[Answer]:
    """Asks one question after the other, and hands their tokens to a streamer of transformers.

    For each question it gets what `generate` gives it: the prompt `[1, tokens]`, each new token
    `[1]`, and the end; the end after an error too, since a reader would wait for it.

    Args:
        ask: Called in this thread.
        context: Tokens before each question.
        questions: In tokens.
        streamer: With `put` and `end`.
    """

    def put(token_ids: list[int]) -> None:
        for token_id in token_ids:
            streamer.put(torch.tensor([token_id]))

    answers = []
    for question in questions:
        streamer.put(torch.tensor([context + question]))
        try:
            answers.append(ask(question, put))
        finally:
            streamer.end()
    return answers
