"""The tests of the Triton kernels: on a GPU they run there, see tests/plugin/triton.

python -m benchmarks.gpu.kernel_tests --output FOLDER [--quick]
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.gpu.command import run_stage

ROOT = Path(__file__).parents[2]
TESTS = "tests/plugin/triton"
QUICK = (
    "attention",
    "selection",
    "flags",
    "lists",
    "page_lists",
    "key_lists",
    "label_numbers",
    "channel_labels",
    "page_bounds",
    "page_products",
    "writing",
    "whole_step",
)
_MOST_PROCESSES = 8
NEEDED = ("pytest", "hypothesis", "numba")


def stage(device: str, is_quick: bool, variant: str) -> dict[str, Any]:
    """The stage's result; see `command.run_stage`."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        return {"skipped": f"not installed: {', '.join(missing)}"}
    chosen = [f"{TESTS}/test_{name}.py" for name in QUICK] if is_quick else [TESTS]
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider"]
    if importlib.util.find_spec("xdist") is not None:  # most of the time kernels are compiled
        command += ["-n", str(max(1, min(_MOST_PROCESSES, (os.cpu_count() or 1) // 2)))]
    process = subprocess.Popen(
        [*command, *chosen], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line.strip())
    failures = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    if process.wait() != 0 and not failures:
        failures = [f"pytest ended with {process.returncode}"]
    return {"summary": lines[-1] if lines else "", "failures": failures}


if __name__ == "__main__":
    run_stage("kernels", __doc__ or "", stage)
