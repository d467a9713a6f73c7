"""A real server of adapters' own: shared, with an API key, and gone when its holder crashes."""

import json
import os
import signal
import subprocess
import sys

import pytest
import requests

from sparse_attention_hub import ModelAdapterVLLM, Request
from sparse_attention_hub.adapters import ServerConnectionError, ServerRequestError
from sparse_attention_hub.sparse_attention.presets import get_preset
from tests.adapters.processes import descendants, end_all, exists, wait_until
from tests.e2e.conftest import ARGUMENTS, ENVIRONMENT, REPOSITORY

HOLDS_A_SERVER = f"""
import json, sys
from sparse_attention_hub import ModelAdapterVLLM
from sparse_attention_hub.adapters.model_servers.shared_vllm import get_server_stats
from sparse_attention_hub.sparse_attention.presets import get_preset
adapters = [
    ModelAdapterVLLM(
        sys.argv[1],
        get_preset("streaming-llm"),
        api_key="the key",
        server_kwargs={{"arguments": {ARGUMENTS}, "environment": {ENVIRONMENT}}},
    )
    for _ in range(2)
]
print(json.dumps([adapters[1].server.base_url, get_server_stats()]), flush=True)
sys.stdin.read()
"""


class KillsAtThirdToken:
    """A streamer."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.tokens = 0

    def put(self, value) -> None:
        self.tokens += value.dim() == 1
        if self.tokens == 3:
            os.kill(self.pid, signal.SIGKILL)

    def end(self) -> None:
        pass


def test_a_server_of_ones_own(model_path) -> None:
    """One start for all of it, since it takes half a minute."""
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDS_A_SERVER, model_path],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    started: list[int] = []
    try:
        base_url, stats = json.loads(holder.stdout.readline())
        started = descendants(holder.pid)
        assert (stats["total_servers"], stats["total_references"]) == (1, 2)
        assert "the key" not in str(stats)

        health = base_url.removesuffix("v1") + "health"
        assert requests.get(health, timeout=60).status_code == 200
        for key in ("another key", None):
            with pytest.raises(ServerRequestError, match="Unauthorized") as error:
                ModelAdapterVLLM(model_path, base_url=base_url, api_key=key)
            assert error.value.status_code == 401

        adapter = ModelAdapterVLLM(
            model_path,
            get_preset("streaming-llm"),
            base_url=base_url,
            api_key="the key",
            sparse_by_default=True,
        )
        request = Request("", "What is the capital of France?")
        assert "Paris" in adapter.process_request(request).responses
        long_answer = {"max_new_tokens": 4000, "min_new_tokens": 4000}
        streamer = KillsAtThirdToken(holder.pid)
        with pytest.raises(ServerConnectionError, match="went away|broke off|failed"):
            adapter.process_request(request, {**long_answer, "streamer": streamer})
        assert 3 <= streamer.tokens < 4000
        assert len(started) >= 3  # the guard, the API server, the engine
        assert wait_until(lambda: not any(map(exists, started)), 60)
        with pytest.raises(ServerConnectionError, match="refused"):
            adapter.process_request(request)
    finally:
        holder.kill()
        holder.wait()
        end_all(started)
