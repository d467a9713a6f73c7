"""The progress bar of a request: its tokens."""

from __future__ import annotations

import threading
from types import TracebackType

from tqdm import tqdm

LONG_PROMPT_TOKENS = 2048
LONG_ANSWER_TOKENS = 256
"""Requests with more of either show their progress without being asked: they take seconds."""


class TokenProgress:
    """Counts generated tokens of all questions; several threads may report at once."""

    def __init__(
        self, prompt_tokens: int, num_questions: int, max_new_tokens: int, show: bool | None
    ) -> None:
        """Opens the bar.

        Args:
            prompt_tokens: Of context and questions.
            num_questions: How many.
            max_new_tokens: Of each answer.
            show: See `RequestOptions.show_progress`.
        """
        total = num_questions * max_new_tokens
        is_long = prompt_tokens > LONG_PROMPT_TOKENS or total > LONG_ANSWER_TOKENS
        # tqdm's None: only on a terminal.
        disable = (None if is_long else True) if show is None else not show
        self._lock = threading.Lock()
        self._max_new_tokens = max_new_tokens
        self._bar = tqdm(
            total=total, unit="token", disable=disable, desc=f"reading {prompt_tokens} tokens"
        )

    def add(self, tokens: int = 1) -> None:
        """Counts tokens that have come."""
        with self._lock:
            if self._bar.n == 0:
                self._bar.set_description("answering", refresh=False)
            self._bar.update(tokens)

    def end_of_answer(self, new_tokens: int) -> None:
        """Takes tokens that will not come out of the total."""
        with self._lock:
            self._bar.total -= max(0, self._max_new_tokens - new_tokens)
            self._bar.refresh()

    def __enter__(self) -> TokenProgress:
        """The progress itself; the bar is closed at the end of the `with` block."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Closes the bar."""
        self._bar.close()
