"""A child process that cannot outlive this one, with its log."""

from __future__ import annotations

import atexit
import logging
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from sparse_attention_hub.adapters.model_servers import child_guard

logger = logging.getLogger(__name__)

_LOG_TAIL_LINES = 40
_ERROR = re.compile(r"\b[A-Za-z]+(Error|Exception): .*")


class GuardedProcess:
    """Runs a command that ends, with all its processes, when this process ends, however it ends.

    Attributes:
        log_path: What the command writes to its standard output and error.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], name: str) -> None:
        """Starts the command.

        Args:
            command: Program and arguments.
            environment: All of its environment variables.
            name: Begins the name of the log file.
        """
        descriptor, log_name = tempfile.mkstemp(prefix=f"{name}-", suffix=".log")
        self.log_path = Path(log_name)
        logger.info("starting %s (log: %s)", " ".join(command), log_name)
        with os.fdopen(descriptor, "wb") as log:
            self._guard = subprocess.Popen(
                [sys.executable, child_guard.__file__, *command],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
        atexit.register(self.stop)

    @property
    def exit_status(self) -> int | None:
        """Of the command; None while it runs."""
        return self._guard.poll()

    def log_tail(self, lines: int = _LOG_TAIL_LINES) -> str:
        """The end of the log, and the errors before it.

        An error in a process that the command started stands long before the end, which says only
        that there was one.
        """
        log = self.log_path.read_text(encoding="utf-8", errors="replace").splitlines()
        errors = dict.fromkeys(
            found.group() for line in log[:-lines] if (found := _ERROR.search(line))
        )
        return "\n".join([*errors, f"end of {self.log_path}:", *log[-lines:]])

    def stop(self) -> None:
        """Ends the command and every process it started; does nothing when it has ended."""
        atexit.unregister(self.stop)
        assert self._guard.stdin is not None
        self._guard.stdin.close()  # the guard takes this as the parent's end
        # The guard ends in GRACE_S and a third of it, whatever its command does.
        self._guard.wait(2 * child_guard.GRACE_S)
