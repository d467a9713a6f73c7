"""The clients of `examples/clients`, run as a user runs them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

CLIENTS = Path(__file__).resolve().parents[3] / "examples" / "clients"


def run(command: list[str], **environment: str) -> str:
    result = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_curl(sparse) -> None:
    output = run(["sh", str(CLIENTS / "curl.sh"), sparse.server.base_url, sparse.server.model_name])
    assert output.count('"object":"text_completion"') == 2
    counts = sparse.statistics(re.search(r'"tag":"([\w-]+)"', output).group(1)).json()
    assert 0 < counts["density"] < 1
    assert f'"density":{counts["density"]}' in output
    # The whole prompt is sparse, and every generated token that was fed back.
    prompt_tokens = int(re.findall(r'"prompt_tokens":(\d+)', output)[1])
    assert counts["sparse_queries"] >= prompt_tokens


@pytest.mark.parametrize(
    ("program", "from_environment"),
    [("openai_completion.py", False), ("openai_chat_stream.py", True)],
)
def test_python(sparse, program, from_environment) -> None:
    url, model = sparse.server.base_url, sparse.server.model_name
    command = [sys.executable, str(CLIENTS / program)]
    if from_environment:
        output = run(command, OPENAI_BASE_URL=url, OPENAI_MODEL=model)
    else:
        output = run([*command, "--base-url", url, "--model", model])
    answers = dict(re.findall(r"^(dense|sparse): (.+)$", output, re.MULTILINE))
    assert set(answers) == {"dense", "sparse"}
    density, queries = re.search(r"^density: ([\d.]+) of the keys of (\d+)", output, re.M).groups()
    assert 0 < float(density) < 1
    if "chat" in program:
        assert "Paris" in answers["dense"]
        assert int(queries) < 64
    else:
        # The question and the answer, not the document.
        assert 24 < int(queries) < 50
