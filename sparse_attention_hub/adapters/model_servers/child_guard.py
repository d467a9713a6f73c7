"""Runs a command, and ends it with everything it started when its parent goes away.

`python child_guard.py COMMAND...`. Standard input is a pipe that the parent holds and never
writes to: it closes when the parent closes it, ends, or is killed, however that happens. A fork of
the parent may hold a copy of the pipe, so the parent's id is watched too. Only the standard
library is imported, since this must be up first.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable

GRACE_S = 15.0
"""Seconds from asking the command to end to ending it; what it leaves behind gets a third."""

_POLL_S = 0.5
_PR_SET_PDEATHSIG = 1  # of Linux' prctl


def _end_with_parent(
    child: subprocess.Popen[bytes], parent: int, is_asked_to_end: threading.Event
) -> None:
    while not is_asked_to_end.is_set() and os.getppid() == parent:
        # Not through sys.stdin, whose lock must be free when Python ends.
        if select.select([0], [], [], _POLL_S)[0]:
            break
    child.terminate()
    try:
        child.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        child.kill()


def _end_group(group: int) -> None:
    """Ends the processes that the command left behind, after a moment to end by themselves."""
    deadline = time.monotonic() + GRACE_S / 3
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGTERM)
        while time.monotonic() < deadline:
            os.killpg(group, 0)  # raises when nobody is left
            time.sleep(0.05)
        os.killpg(group, signal.SIGKILL)


def _signal_at_death_of_guard() -> Callable[[], None] | None:
    """What the command's process runs first, so that it is asked to end if the guard is killed."""
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)  # loaded before the fork, where little is allowed
    return lambda: libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def main(command: list[str]) -> int:
    """Returns the command's exit status."""
    parent, is_asked_to_end = os.getppid(), threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: is_asked_to_end.set())
    child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        start_new_session=True,  # a group of its own, which can be ended without ending this one
        preexec_fn=_signal_at_death_of_guard(),
    )
    watcher = threading.Thread(
        target=_end_with_parent, args=(child, parent, is_asked_to_end), daemon=True
    )
    watcher.start()
    status = child.wait()
    _end_group(child.pid)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
