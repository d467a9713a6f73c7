"""Processes of this machine, read from /proc."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path


def exists(pid: int) -> bool:
    """Whether it runs; one that has ended and waits for its parent does not."""
    return _parent_of_running(pid) is not None


def descendants(pid: int) -> list[int]:
    """Its children, their children, and so on."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and (parent := _parent_of_running(int(entry.name))):
            parents[int(entry.name)] = parent
    found, new = [], [pid]
    while new:
        new = [child for child, parent in parents.items() if parent in new]
        found += new
    return found


def _parent_of_running(pid: int) -> int | None:
    """The parent's id; None for a process that does not run."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] == "Z" else int(fields[1])


def wait_until(condition: Callable[[], bool], seconds: float = 30.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def end_all(pids: list[int]) -> None:
    """Ends what a failed test left behind."""
    for pid in filter(exists, pids):
        os.kill(pid, signal.SIGKILL)
