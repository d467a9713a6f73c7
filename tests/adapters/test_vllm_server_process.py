"""The child process of `ModelServerVLLM`, with commands that stand in for vLLM."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sparse_attention_hub import ModelAdapterVLLM, Request
from sparse_attention_hub.adapters import (
    ModelServerError,
    ServerConnectionError,
    ServerTimeoutError,
)
from sparse_attention_hub.adapters.model_servers import child_guard
from sparse_attention_hub.adapters.model_servers.shared_vllm import (
    acquire_server,
    get_server_stats,
    release_server,
)
from sparse_attention_hub.adapters.model_servers.vllm import ModelServerVLLM
from tests.adapters.processes import descendants, end_all, exists, wait_until
from tests.adapters.stand_in_server import stand_in_command

REPOSITORY = Path(__file__).resolve().parents[2]
SPAWNS_AND_SLEEPS = (
    "import subprocess, sys, time;"
    "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']);"
    "print(p.pid, flush=True); time.sleep(600)"
)
NO_SERVERS = {"total_servers": 0, "total_references": 0, "server_keys": []}


HOLDS_A_SERVER = """
import signal
import sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background
from sparse_attention_hub.adapters.model_servers.shared_vllm import acquire_server
from sparse_attention_hub.adapters.model_servers.vllm import ModelServerVLLM
from tests.adapters.stand_in_server import stand_in_command
ModelServerVLLM._command = stand_in_command("answer")
acquire_server(ModelServerVLLM("m"))
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT, None])
def test_no_orphans_however_the_holder_of_a_server_ends(number) -> None:
    """None: by itself, without letting go of the server."""
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDS_A_SERVER],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout.readline() == "ready\n"
    started = descendants(holder.pid)
    try:
        assert len(started) == 2  # the guard and the server
        if number is None:
            holder.stdin.close()
        else:
            holder.send_signal(number)
        status = holder.wait(60)
        assert status == (0 if number is None else -number)
        assert wait_until(lambda: not any(map(exists, started)))
    finally:
        holder.kill()
        end_all(started)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_no_orphans_when_the_guard_itself_is_ended(number) -> None:
    command = [sys.executable, child_guard.__file__, sys.executable, "-c", "import time;"]
    command[-1] += "print('up', flush=True); time.sleep(600)"
    guard = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert guard.stdout.readline() == "up\n"
    started = descendants(guard.pid)
    assert len(started) == 1
    guard.send_signal(number)
    try:
        assert wait_until(lambda: not any(map(exists, started)))
    finally:
        end_all(started)
    guard.wait(30)
    guard.stdin.close()


def test_a_fork_that_holds_the_pipe_does_not_keep_the_server() -> None:
    forks = HOLDS_A_SERVER.replace(
        "sys.stdin.read()",
        "import os, time\nif not os.fork():\n    time.sleep(600)\nsys.stdin.read()",
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", forks],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout.readline() == "ready\n"
    assert wait_until(lambda: len(descendants(holder.pid)) == 3)
    started = descendants(holder.pid)
    try:
        holder.kill()
        holder.wait()
        assert wait_until(lambda: sum(map(exists, started)) == 1)  # the fork itself
    finally:
        end_all(started)


def test_guard_passes_the_exit_status_on() -> None:
    command = [sys.executable, child_guard.__file__, sys.executable, "-c", "raise SystemExit(7)"]
    guard = subprocess.Popen(command, stdin=subprocess.PIPE)
    assert guard.wait(30) == 7
    guard.stdin.close()


def test_a_server_that_dies_at_its_start_is_an_error_with_its_log(monkeypatch) -> None:
    server = ModelServerVLLM("m")
    failing = [sys.executable, "-c", "print('the reason'); raise SystemExit(3)"]
    monkeypatch.setattr(server, "_command", lambda port: failing)
    with pytest.raises(ModelServerError, match="status 3") as error:
        server.start()
    assert "the reason" in str(error.value)
    assert not server.is_running()
    with pytest.raises(ModelServerError, match="not running"):
        _ = server.base_url


def test_a_server_that_never_answers_is_stopped(monkeypatch) -> None:
    server = ModelServerVLLM("m", startup_timeout_s=3.0)
    monkeypatch.setattr(server, "_command", lambda port: [sys.executable, "-c", SPAWNS_AND_SLEEPS])
    with pytest.raises(ServerTimeoutError, match="did not answer within 3 s") as error:
        server.start()
    grandchild = int(str(error.value).splitlines()[-1])
    assert wait_until(lambda: not exists(grandchild))


def test_command_and_environment(monkeypatch) -> None:
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    stock = ModelServerVLLM("m", arguments=["--dtype", "float32"], api_key="secret")
    assert "--attention-backend" not in stock._command(1)
    assert stock._command(1)[-2:] == ["--dtype", "float32"]
    assert "VLLM_PLUGINS" not in stock._child_environment()
    assert stock._child_environment()["VLLM_API_KEY"] == "secret"
    assert "secret" not in stock._command(1)
    assert "secret" not in stock.key
    sparse = ModelServerVLLM("m", "streaming-llm")
    command = sparse._command(1)
    assert command[command.index("--attention-backend") + 1] == "CUSTOM"
    assert '{"sparse_attention": "streaming-llm"}' in command
    assert sparse._child_environment()["VLLM_PLUGINS"] == "sparse_attention"


def test_adapters_share_servers_by_key_and_the_last_one_stops_it(monkeypatch, model_path) -> None:
    monkeypatch.setattr(ModelServerVLLM, "_command", stand_in_command("answer"))
    with ModelAdapterVLLM(model_path) as first:
        second = ModelAdapterVLLM(model_path, server_kwargs={"arguments": []})
        assert second.server is first.server
        with ModelAdapterVLLM(model_path, server_kwargs={"arguments": ["--seed", "1"]}) as other:
            assert other.server is not first.server
            assert get_server_stats()["total_servers"] == 2
        assert not other.server.is_running()
        second.close()
        second.close()  # counts once
        assert get_server_stats()["total_references"] == 1
        assert first.process_request(Request("A", "B")).details[0].new_tokens == 3
    assert not first.server.is_running()
    assert get_server_stats() == NO_SERVERS
    with pytest.raises(ModelServerError, match="not running"):
        first.process_request(Request("A", "B"))


def test_an_adapter_that_is_dropped_lets_go_of_its_server(monkeypatch, model_path) -> None:
    monkeypatch.setattr(ModelServerVLLM, "_command", stand_in_command("answer"))
    adapter = ModelAdapterVLLM(model_path)
    server = adapter.server
    assert server.is_running()
    del adapter
    assert not server.is_running()
    assert get_server_stats() == NO_SERVERS


def test_releases_are_counted(monkeypatch) -> None:
    monkeypatch.setattr(ModelServerVLLM, "_command", stand_in_command("answer"))
    server = acquire_server(ModelServerVLLM("m"))
    entry_of_two = acquire_server(ModelServerVLLM("m"))
    assert entry_of_two is server
    release_server(server)
    assert server.is_running()
    release_server(server)
    assert not server.is_running()


def test_a_server_that_dies_midway_is_an_error_with_its_log_and_stays_dead(
    monkeypatch, model_path
) -> None:
    monkeypatch.setattr(ModelServerVLLM, "_command", stand_in_command("die"))
    with ModelAdapterVLLM(model_path, max_retries=0) as adapter:
        for message in ("went away", "refused"):
            with pytest.raises(ServerConnectionError, match=message) as error:
                adapter.process_request(Request("A", "B"))
            assert "ValueError: the reason" in str(error.value)
            # Before that, its port may still take a connection.
            assert wait_until(lambda: not adapter.server.is_running())
        with pytest.raises(ServerConnectionError, match="is gone") as error:
            ModelAdapterVLLM(model_path)
        assert "ValueError: the reason" in str(error.value)
        assert get_server_stats()["total_references"] == 1
    assert get_server_stats() == NO_SERVERS
    with ModelAdapterVLLM(model_path) as anew:
        assert anew.server is not adapter.server


def test_attaching(monkeypatch) -> None:
    monkeypatch.setattr(ModelServerVLLM, "_command", stand_in_command("answer"))
    with ModelServerVLLM("m") as started:
        with ModelServerVLLM("m", base_url=started.base_url) as attached:
            assert attached.base_url == started.base_url
            assert attached.is_running()
        assert started.is_running()  # it was left alone
    assert not attached.is_running()
    with pytest.raises(ServerConnectionError, match="is gone"):
        attached.start()
    with pytest.raises(ValueError, match="for one that is started"):
        ModelServerVLLM("m", "streaming-llm", base_url="http://127.0.0.1:1")
