"""What a benchmark says of the machine it ran on."""

import platform
from pathlib import Path


def processor_name() -> str:
    """Of this machine."""
    file = Path("/proc/cpuinfo")
    for line in file.read_text().splitlines() if file.exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
