"""What the OpenAI client raises, as errors of this module."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import openai

from sparse_attention_hub.adapters.completions import AnswerBrokeOff
from sparse_attention_hub.adapters.model_servers.vllm import ModelServerVLLM
from sparse_attention_hub.adapters.utils.exceptions import (
    ServerConnectionError,
    ServerRequestError,
    ServerTimeoutError,
)


@contextmanager
def translated_errors(server: ModelServerVLLM) -> Iterator[None]:
    """Translates errors of the client; with the end of the server's log if it is ours.

    Raises:
        ServerTimeoutError: The server was silent for too long.
        ServerConnectionError: It cannot be reached, went away during an answer, or its engine died.
        ServerRequestError: It answered with an HTTP error, at once or during an answer.
    """
    where = f"the vLLM server at {server.root_url}"
    try:
        yield
    except openai.APITimeoutError as error:
        raise ServerTimeoutError(
            f"{where} was silent for too long",
            _words(error, server),
            original_error=error,
        ) from error
    except (openai.APIConnectionError, AnswerBrokeOff) as error:
        raise ServerConnectionError(
            f"{where} cannot be reached, or went away", _words(error, server), original_error=error
        ) from error
    except openai.APIError as error:
        # In the middle of a stream an error comes as an event, with the status in its body.
        status = getattr(error, "status_code", None) or _status_in_body(error)
        if status is not None and status < 500:
            raise ServerRequestError(
                f"{where} refused a request (HTTP {status})", _server_words(error), status, error
            ) from error
        kind = ServerRequestError if server.is_healthy() else ServerConnectionError
        raise kind(
            f"{where} failed (HTTP {status})", _words(error, server), status, error
        ) from error


def _status_in_body(error: openai.APIError) -> int | None:
    code = error.body.get("code") if isinstance(error.body, dict) else None
    return code if isinstance(code, int) else None


def _words(error: Exception, server: ModelServerVLLM) -> str:
    cause = f" ({error.__cause__})" if error.__cause__ else ""
    said = _server_words(error) if isinstance(error, openai.APIError) else str(error)
    return "\n".join(text for text in (f"{said}{cause}", server.log_tail()) if text)


def _server_words(error: openai.APIError) -> str:
    """What the server said; the client overlooks an error that is a plain text."""
    return error.body if isinstance(error.body, str) else error.message
