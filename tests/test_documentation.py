"""Every code block of the documentation runs as written; what cannot is listed with the reason.

Those that need a server: `tests/e2e/one_server/test_documentation.py`.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from examples.documents import python_manual
from sparse_attention_hub import ModelAdapterHF
from tests.documentation import REPOSITORY, Block, documented_blocks
from vllm_sparse_plugin.serving_config import ServingConfig

BLOCKS = documented_blocks()

NOT_RUN = {
    "make demo": "installs a virtual environment, then runs examples.demo",
    "make test": "is what runs this test",
    'pip install "vllm>=0.32,<0.34" && pip install --no-deps .': "needs a GPU and its vLLM",
    "benchmarks/gpu_check.sh": "needs a GPU; dry run by tests/benchmarks/test_gpu_check.py",
    "VLLM_PLUGINS=sparse_attention vllm serve": "needs a GPU; tests start the same on a CPU",
    "python -m examples.compose_maskers": "minutes; run by tests/adapters/test_examples.py",
    "python -m examples.compare_methods": "minutes; run by tests/adapters/test_examples.py",
    "python -m examples.serve_own_masker": "a server; run by tests/e2e/test_own_masker_example.py",
}
"""Shell commands that are not run here, by how they begin, and why."""


def of_language(*languages: str) -> list:
    blocks = [block for block in BLOCKS if block.language in languages]
    return [pytest.param(block, id=block.place) for block in blocks if not block.needs_a_server]


def commands(block: Block) -> list[str]:
    """Of a shell block, without comments; a line that ends in a backslash goes on."""
    lines = block.text.replace("\\\n", " ").splitlines()
    return [line.split("  #")[0].strip() for line in lines if line.strip()]


def is_listed(command: str) -> bool:
    return any(command.startswith(beginning) for beginning in NOT_RUN)


def test_every_block_is_of_a_kind_that_is_run() -> None:
    assert {block.language for block in BLOCKS} == {"python", "json", ""}
    assert len({block.place.split(":")[0] for block in BLOCKS}) == 3


def test_the_list_of_what_is_not_run_has_nothing_too_much() -> None:
    written = [command for block in BLOCKS if not block.language for command in commands(block)]
    for beginning, reason in NOT_RUN.items():
        assert any(command.startswith(beginning) for command in written), beginning
        file = reason.rpartition("run by ")[2]
        if file.endswith(".py"):
            assert (
                beginning.split()[-1].removeprefix("examples.") in (REPOSITORY / file).read_text()
            )


@pytest.mark.parametrize("block", of_language("python"))
def test_python(block: Block, tiny_path: str, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    block.run_python(tiny_path)
    if "print(" in block.text:
        assert capsys.readouterr().out


def test_the_quick_start_prints_what_it_says(tiny_path, capsys, monkeypatch) -> None:
    answers = []
    process = ModelAdapterHF.process_request

    def listen(self, *arguments):
        answers.append(process(self, *arguments))
        return answers[-1]

    monkeypatch.setattr(ModelAdapterHF, "process_request", listen)
    block = next(b for b in BLOCKS if b.place.startswith("sparse_attention_hub/adapters"))
    block.run_python(tiny_path)
    assert [answer.mode for answer in answers] == ["dense", "sparse"]
    output = capsys.readouterr().out
    assert output == f"{answers[0].responses[0]}\nsparse {answers[1].density}\n"
    assert output.startswith("Answer: ")


@pytest.mark.parametrize("block", of_language("json"))
def test_json(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it names is there: a package of the reader's own with maskers."""
    package = tmp_path / "my_package"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "my_maskers.py").write_text("import examples.own_masker")
    monkeypatch.syspath_prepend(tmp_path)
    written = json.loads(block.text)
    config = ServingConfig.parse(written)
    assert len(config.attention.masker_configs) == len(written["maskers"])
    assert "my_package.my_maskers" in sys.modules


@pytest.mark.parametrize("block", of_language(""))
def test_shell(block: Block, tiny_path: str, tmp_path: Path) -> None:
    """Runs the commands in a folder that has the files they name."""
    (tmp_path / "FILE").write_text(python_manual(["formatstrings"], 1500))
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(REPOSITORY),
    }
    for command in commands(block):
        if is_listed(command):
            continue
        ended = subprocess.run(
            command.replace("MODEL", tiny_path),
            shell=True,
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert ended.returncode == 0, command + "\n" + ended.stderr
        output = command.partition("--output ")[2]
        assert not output or (tmp_path / output).stat().st_size > 0
