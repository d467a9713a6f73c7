"""Runs a command, and ends it with everything it started when its parent goes away.

`python child_guard.py COMMAND...`. Standard input is a pipe that the parent holds and never
writes to: it closes when the parent closes it, ends, or is killed, however that happens. Only the
standard library is imported, since this must be up first.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time

GRACE_S = 15.0
"""Seconds from asking the command to end to ending it; what it leaves behind gets a third."""


def _end_when_parent_is_gone(child: subprocess.Popen[bytes]) -> None:
    os.read(0, 1)  # not through sys.stdin, whose lock must be free when Python ends
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


def main(command: list[str]) -> int:
    """Returns the command's exit status."""
    # A group of its own, which can be ended without ending this process.
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    threading.Thread(target=_end_when_parent_is_gone, args=(child,), daemon=True).start()
    status = child.wait()
    _end_group(child.pid)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
