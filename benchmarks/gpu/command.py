"""The command line of a stage: where its result goes, and how quick it is to be."""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger(__name__)

SKIPPED = 77
"""Exit status of a stage that this machine cannot run; its log says why."""
Stage = Callable[[str, bool, str], dict[str, Any]]
"""Takes the device, whether it is to be quick, and the variant; returns what a file holds."""


def run_stage(name: str, text: str, stage: Stage, variants: Sequence[str] = ()) -> None:
    """Runs a stage and writes `OUTPUT/NAME.json`, or `OUTPUT/NAME_VARIANT.json`.

    Args:
        name: Of the file.
        text: The stage's help.
        stage: What to do.
        variants: Of the stage, if it has any: one of them is named.

    Raises:
        SystemExit: The result says that something is wrong, or was skipped.
    """
    parser = argparse.ArgumentParser(
        description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder of the results")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="less of everything")
    if variants:
        parser.add_argument("variant", choices=variants)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    arguments.output.mkdir(parents=True, exist_ok=True)
    result = stage(arguments.device, arguments.quick, getattr(arguments, "variant", ""))
    result |= {"measured": datetime.now().isoformat(timespec="seconds"), "commit": commit()}
    result["gpu"] = torch.cuda.get_device_name() if arguments.device == "cuda" else "none (dry run)"
    full_name = "_".join([name, *([arguments.variant] if variants else [])])
    write_result(arguments.output, full_name, result)
    if "skipped" in result:
        logger.warning("skipped: %s", result["skipped"])
        raise SystemExit(SKIPPED)
    failures = result.get("failures", [])
    if failures:
        raise SystemExit("\n".join(["FAILED:", *map(str, failures)]))


def write_result(folder: Path, name: str, result: dict[str, Any]) -> None:
    """A stage's file, in one go: what stops in between leaves the old one."""
    part = folder / f"{name}.json.part"
    part.write_text(json.dumps(result, indent=1) + "\n")
    part.replace(folder / f"{name}.json")


def commit() -> str:
    """Of the repository, and whether files differ from it; "unknown" without git.

    GPU_CHECK_COMMIT says it where files came without their history.
    """
    if given := os.environ.get("GPU_CHECK_COMMIT"):
        return given
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=10", "--exclude=*"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return found.stdout.strip() or "unknown"
