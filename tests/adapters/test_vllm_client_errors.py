"""What goes wrong between the adapter and a server, as this module's errors.

A small HTTP server stands in for vLLM, since it can be told to stall and to break.
"""

import socket
import threading
from collections.abc import Iterator

import openai
import pytest

from sparse_attention_hub import ModelAdapterVLLM, Request
from sparse_attention_hub.adapters import (
    ModelServerError,
    ServerConnectionError,
    ServerRequestError,
    ServerTimeoutError,
)
from sparse_attention_hub.sparse_attention.presets import get_preset
from tests.adapters.stand_in_server import TOKENS, StandInServer

REQUEST = Request("A context.", "A question?")


@pytest.fixture
def stand_in() -> Iterator[StandInServer]:
    server = StandInServer()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield server
    server.stalled.set()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def adapter_of(stand_in, model_path):
    def make(behaviour: str, **arguments) -> ModelAdapterVLLM:
        url = f"http://127.0.0.1:{stand_in.server_port}/{behaviour}/v1"
        return ModelAdapterVLLM(model_path, base_url=url, **arguments)

    return make


def test_the_stand_in_answers(adapter_of) -> None:
    detail = adapter_of("answer").process_request(REQUEST).details[0]
    assert list(detail.token_ids) == TOKENS
    assert (detail.finish_reason, detail.density) == ("length", 1.0)


@pytest.mark.parametrize(
    ("behaviour", "kind", "status", "message", "posts"),
    [
        ("refuse", ServerRequestError, 400, "not this one", 1),
        ("no-key", ServerRequestError, 401, "Unauthorized", 1),
        ("fail", ServerRequestError, 500, "it broke", 3),
        ("break-off", ServerConnectionError, None, "broke off", 1),
        ("error-midway", ServerRequestError, 500, "the engine broke", 1),
    ],
)
def test_failures(adapter_of, stand_in, behaviour, kind, status, message, posts) -> None:
    with pytest.raises(ServerRequestError, match=message) as error:
        adapter_of(behaviour, max_retries=2).process_request(REQUEST)
    assert type(error.value) is kind
    assert error.value.status_code == status
    assert len(stand_in.posts) == posts


@pytest.mark.parametrize(("behaviour", "posts"), [("stall", 2), ("stall-midway", 1)])
def test_silence_is_a_timeout(adapter_of, stand_in, behaviour, posts) -> None:
    adapter = adapter_of(behaviour, timeout_s=0.5, max_retries=1)
    with pytest.raises(ServerTimeoutError, match="silent") as error:
        adapter.process_request(REQUEST)
    assert isinstance(error.value.original_error, openai.APITimeoutError)
    assert len(stand_in.posts) == posts


def test_retries_hide_what_passes(adapter_of, stand_in) -> None:
    response = adapter_of("busy-once", max_retries=1).process_request(REQUEST)
    assert list(response.details[0].token_ids) == TOKENS
    assert len(stand_in.posts) == 2
    stand_in.posts.clear()
    with pytest.raises(ServerRequestError, match="busy") as error:
        adapter_of("busy-once", max_retries=0).process_request(REQUEST)
    assert error.value.status_code == 503


def test_after_an_error_the_other_questions_are_not_asked(adapter_of, stand_in) -> None:
    with pytest.raises(ServerRequestError):
        adapter_of("refuse").process_request(Request("A context.", ["One?", "Two?", "Three?"]))
    assert len(stand_in.posts) == 1


def test_a_streamer_is_ended_by_an_error(adapter_of) -> None:
    class Recorder:
        def __init__(self) -> None:
            self.calls: list[object] = []

        def put(self, value) -> None:
            self.calls.append(value.tolist())

        def end(self) -> None:
            self.calls.append("end")

    streamer = Recorder()
    with pytest.raises(ServerConnectionError):
        adapter_of("break-off").process_request(REQUEST, {"streamer": streamer})
    assert streamer.calls[1:] == [[TOKENS[0]], [TOKENS[1]], "end"]


def test_no_server(model_path) -> None:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))  # and not listening
        url = f"http://127.0.0.1:{reserved.getsockname()[1]}/v1"
        with pytest.raises(ServerConnectionError, match="cannot be reached.*refused"):
            ModelAdapterVLLM(model_path, base_url=url, max_retries=0)


def test_a_server_without_the_plugin_cannot_be_asked_sparsely(adapter_of) -> None:
    adapter = adapter_of("answer", sparse_attention_config=get_preset("streaming-llm"))
    with adapter.enable_sparse_mode(), pytest.raises(ModelServerError, match="plugin"):
        adapter.process_request(REQUEST)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"timeout_s": 0}, "timeout_s must be a number of seconds > 0, got 0"),
        ({"max_retries": -1}, "max_retries must be an integer >= 0, got -1"),
        ({"server_kwargs": {"arguments": ["--x"]}}, "not for base_url"),
        ({"base_url": "127.0.0.1:8000"}, "must begin with http"),
    ],
)
def test_bad_arguments(model_path, arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        ModelAdapterVLLM(model_path, **{"base_url": "http://127.0.0.1:1/v1", **arguments})
