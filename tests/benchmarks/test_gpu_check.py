"""`benchmarks/gpu_check.sh`: dry runs of what needs no GPU, and stages that fail."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_check.sh"


def run(
    *arguments: str, cwd: Path, python: str = sys.executable, more: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "STAGE_SECONDS"}
    return subprocess.run(
        [str(SCRIPT), *arguments],
        cwd=cwd,
        env={**environment, "PYTHON": python, "OMP_NUM_THREADS": "1", **(more or {})},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_its_syntax() -> None:
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)


def test_help_and_mistakes(tmp_path: Path) -> None:
    help_text = run("--help", cwd=tmp_path)
    assert help_text.returncode == 0
    assert "small_racecheck" in help_text.stdout
    for arguments, words in (
        (["--stages", "environment nonsense"], "unknown stage: nonsense"),
        (["--fast"], "unknown option: --fast"),
    ):
        mistake = run(*arguments, cwd=tmp_path)
        assert mistake.returncode == 2
        assert words in mistake.stderr


def test_a_dry_run(tmp_path: Path) -> None:
    """In Triton's interpreter, the results compared with the reference's."""
    stages = "environment bandwidth attention"
    process = run("--device", "cpu", "--stages", stages, "results", cwd=tmp_path)
    assert process.returncode == 0, process.stdout + process.stderr
    content = json.loads((tmp_path / "results" / "gpu_check.json").read_text())
    for name in stages.split():
        assert content["stages"][name]["status"] == 0
    assert content["is_dry"]
    [context] = content["results"]["attention"]["contexts"]
    assert context["sparse"][0]["relative_error"] < 1e-5
    kernels = {record["kernel"] for record in content["results"]["bandwidth"]["records"]}
    assert {"page gather", "token gather", "index scan", "write and update"} < kernels
    assert "A dry run" in (tmp_path / "results" / "gpu_check.md").read_text()


def test_a_stage_knows_its_limit(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(
        '#!/bin/sh\ncase "$2" in\n*environment) echo "limit: $STAGE_SECONDS" ;;\n'
        f'*) exec {sys.executable} "$@" ;;\nesac\n'
    )
    python.chmod(0o755)
    for given, wanted in (({}, "580"), ({"STAGE_SECONDS": "77"}, "77")):
        run("--stages", "environment", str(tmp_path), cwd=tmp_path, python=str(python), more=given)
        assert (tmp_path / "environment.log").read_text() == f"limit: {wanted}\n"


def test_a_failed_stage_hides_no_other_one(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(
        '#!/bin/sh\ncase "$2" in\n*engine_tokens) echo the reason; exit 3 ;;\n'
        f'*) exec {sys.executable} "$@" ;;\nesac\n'
    )
    python.chmod(0o755)
    process = run(
        "--device",
        "cpu",
        "--stages",
        "tokens environment",
        str(tmp_path),
        cwd=tmp_path,
        python=str(python),
    )
    assert process.returncode == 1
    assert "correctness failed: tokens" in process.stderr
    content = json.loads((tmp_path / "gpu_check.json").read_text())
    assert content["stages"]["tokens"]["status"] == 3
    assert content["stages"]["tokens"]["last_words"] == ["the reason"]
    assert content["stages"]["environment"]["status"] == 0
