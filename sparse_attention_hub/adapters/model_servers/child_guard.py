"""Runs a command, and ends it with everything it started when its parent goes away.

`python child_guard.py COMMAND...` in a session (process group) of its own. Standard input is a pipe
that the parent holds and never writes to: it closes when the parent closes it, ends, or is
killed, however that happens. Only the standard library is imported, since this must be up first.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

GRACE_S = 15.0
"""Seconds from asking the command to end to ending it."""


def _end_group_when_parent_is_gone(child: subprocess.Popen[bytes]) -> None:
    sys.stdin.buffer.read()
    child.terminate()
    try:
        child.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        pass
    # Whatever the command left behind, this process included.
    os.killpg(os.getpgrp(), signal.SIGKILL)


def main(command: list[str]) -> int:
    """Returns the command's exit status."""
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    watcher = threading.Thread(target=_end_group_when_parent_is_gone, args=(child,), daemon=True)
    watcher.start()
    return child.wait()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
