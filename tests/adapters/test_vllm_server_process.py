"""The child process of `ModelServerVLLM`, with commands that stand in for vLLM."""

import os
import subprocess
import sys
import time

import pytest

from sparse_attention_hub.adapters.model_servers import child_guard
from sparse_attention_hub.adapters.model_servers.vllm import ModelServerVLLM
from sparse_attention_hub.adapters.utils import ModelServerError
from sparse_attention_hub.adapters.vllm import _completion_arguments

SPAWNS_AND_SLEEPS = (
    "import subprocess, sys, time;"
    "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']);"
    "print(p.pid, flush=True); time.sleep(600)"
)


def exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as stat:
        return stat.read().rsplit(")", 1)[1].split()[0] != "Z"


def wait_until(condition, seconds: float = 20.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def test_guard_ends_everything_when_its_parent_is_killed() -> None:
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import subprocess, sys, time;"
            f"p = subprocess.Popen([sys.executable, {child_guard.__file__!r}, sys.executable, '-c',"
            f" {SPAWNS_AND_SLEEPS!r}], stdin=subprocess.PIPE, start_new_session=True);"
            "time.sleep(600)",
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    grandchild = int(parent.stdout.readline())
    assert exists(grandchild)
    parent.kill()
    parent.wait()
    assert wait_until(lambda: not exists(grandchild))


def test_guard_passes_the_exit_status_on() -> None:
    command = [sys.executable, child_guard.__file__, sys.executable, "-c", "raise SystemExit(7)"]
    guard = subprocess.Popen(command, stdin=subprocess.PIPE)
    assert guard.wait(30) == 7
    guard.stdin.close()


def test_a_server_that_dies_is_an_error_with_its_log(monkeypatch: pytest.MonkeyPatch) -> None:
    server = ModelServerVLLM("m")
    failing = [sys.executable, "-c", "print('the reason'); raise SystemExit(3)"]
    monkeypatch.setattr(server, "_command", lambda port: failing)
    with pytest.raises(ModelServerError, match="status 3") as error:
        server.start()
    assert "the reason" in str(error.value)
    assert not server.is_running()
    with pytest.raises(ModelServerError, match="not running"):
        _ = server.base_url


def test_a_server_that_never_answers_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    server = ModelServerVLLM("m", startup_timeout_s=3.0)
    monkeypatch.setattr(server, "_command", lambda port: [sys.executable, "-c", SPAWNS_AND_SLEEPS])
    with pytest.raises(ModelServerError, match="did not answer within 3 s") as error:
        server.start()
    grandchild = int(str(error.value).splitlines()[-1])
    assert wait_until(lambda: not exists(grandchild))


def test_command_and_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    stock = ModelServerVLLM("m", arguments=["--dtype", "float32"], api_key="secret")
    assert "--attention-backend" not in stock._command(1)
    assert stock._command(1)[-2:] == ["--dtype", "float32"]
    assert "VLLM_PLUGINS" not in stock._child_environment()
    assert stock._child_environment()["VLLM_API_KEY"] == "secret"
    assert "secret" not in stock._command(1)
    sparse = ModelServerVLLM("m", "streaming-llm")
    command = sparse._command(1)
    assert command[command.index("--attention-backend") + 1] == "CUSTOM"
    assert '{"sparse_attention": "streaming-llm"}' in command
    assert sparse._child_environment()["VLLM_PLUGINS"] == "sparse_attention"


def test_generation_arguments_become_completion_arguments() -> None:
    assert _completion_arguments(None) == {"max_tokens": 50, "temperature": 0.0, "extra_body": {}}
    sampled = _completion_arguments(
        {"do_sample": True, "temperature": 0.5, "top_k": 3, "stop_strings": ["x"], "seed": 1}
    )
    assert sampled == {
        "max_tokens": 50,
        "temperature": 0.5,
        "stop": ["x"],
        "seed": 1,
        "extra_body": {"top_k": 3},
    }
    with pytest.raises(ValueError, match="num_beams.*cannot be sent"):
        _completion_arguments({"num_beams": 2})
    with pytest.raises(ValueError, match="max_new_tokens"):
        _completion_arguments({"max_new_tokens": -1})
