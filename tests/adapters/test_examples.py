"""The example programs run, and show what they say."""

import re
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


def run(module: str, *arguments: str) -> str:
    command = [sys.executable, "-m", module, *arguments]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_compose_maskers() -> None:
    output = run("examples.compose_maskers", "--characters", "2000", "--new-tokens", "4")
    densities = [float(value) for value in re.findall(r"density ([\d.]+)", output)]
    assert densities[0] == 1.0
    assert 0.1 < densities[1] < 0.6


def test_compare_methods(tmp_path) -> None:
    output = run(
        "examples.compare_methods", "--tokens", "600", "--densities", "0.1", "0.2",
        "--output", str(tmp_path),
    )  # fmt: skip
    rows = dict(re.findall(r"^\| ([^|]+?) \| ([\d., |]+) \|$", output, re.MULTILINE))
    assert len(rows) == 8
    errors = {}
    for method, cells in rows.items():
        for cell, wanted in zip(cells.split("|"), (0.1, 0.2), strict=True):
            density, error = (float(number) for number in cell.split(","))
            # Quest reads whole pages, at least three of them, some of which are read already.
            assert abs(density - wanted) < (0.06 if "Quest" in method else 0.01), method
            errors.setdefault(method, []).append(error)
    assert all(error[1] < error[0] for error in errors.values())
    assert errors["oracle top-k"] == min(errors.values())
    assert len(list(tmp_path.glob("*.png"))) == 4
