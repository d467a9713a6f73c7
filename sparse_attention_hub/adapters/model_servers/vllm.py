"""`ModelServerVLLM`: a `vllm serve` process as a child of this one.

vLLM's engine loads and keeps the model; nothing here imports vLLM.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sparse_attention_hub.adapters.model_servers import child_guard
from sparse_attention_hub.adapters.utils.exceptions import ModelServerError

logger = logging.getLogger(__name__)

PLUGIN_NAME = "sparse_attention"
_LOG_TAIL_LINES = 40
_ERROR = re.compile(r"\b[A-Za-z]+(Error|Exception): .*")


class ModelServerVLLM:
    """Starts `vllm serve` on a free loopback port, and ends it with all its processes.

    The server ends when `stop` is called, at the end of a `with` block, and when this process
    ends, however it ends.

    Attributes:
        model_name: Name or folder; also the name under which it is served.
        log_path: What the server writes.
    """

    def __init__(
        self,
        model_name: str,
        sparse_attention: Mapping[str, Any] | str | None = None,
        *,
        arguments: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        api_key: str | None = None,
        startup_timeout_s: float = 600.0,
    ) -> None:
        """Describes the server; `start` starts it.

        Args:
            model_name: Name or folder of the model.
            sparse_attention: The plugin's configuration (maskers, preset name or file); None =
                stock vLLM, without the plugin's backend.
            arguments: Further arguments of `vllm serve`.
            environment: Further environment variables.
            api_key: That clients must send.
            startup_timeout_s: Seconds to wait for the server to answer.
        """
        self.model_name = model_name
        self.log_path: Path | None = None
        self._sparse_attention = sparse_attention
        self._arguments = list(arguments)
        self._environment = dict(environment or {})
        self._api_key = api_key
        self._startup_timeout_s = startup_timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self._port: int | None = None

    @property
    def base_url(self) -> str:
        """Of the OpenAI-compatible API.

        Raises:
            ModelServerError: The server was not started.
        """
        return f"{self._root_url()}/v1"

    def _root_url(self) -> str:
        if self._port is None:
            raise ModelServerError("the vLLM server is not running", self.model_name)
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> ModelServerVLLM:
        """Starts the server and waits until it answers; does nothing when it runs.

        Raises:
            ModelServerError: It ends or does not answer in time; with the end of its log.
        """
        if self._process is not None and self._process.poll() is None:
            return self
        descriptor, name = tempfile.mkstemp(prefix="vllm-serve-", suffix=".log")
        self.log_path = Path(name)
        self._port = _free_port()
        command = self._command(self._port)
        logger.info("starting %s (log: %s)", " ".join(command), name)
        with os.fdopen(descriptor, "wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, child_guard.__file__, *command],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._child_environment(),
                start_new_session=True,
            )
        atexit.register(self.stop)
        try:
            self._wait_until_healthy()
        except BaseException:
            self.stop()
            raise
        return self

    def _command(self, port: int) -> list[str]:
        command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", self.model_name]
        command += ["--host", "127.0.0.1", "--port", str(port)]
        command += ["--served-model-name", self.model_name]
        if self._sparse_attention is not None:
            additional = json.dumps({PLUGIN_NAME: self._sparse_attention})
            command += ["--attention-backend", "CUSTOM", "--additional-config", additional]
        return command + self._arguments

    def _child_environment(self) -> dict[str, str]:
        environment = dict(os.environ)
        if self._sparse_attention is not None:
            # vLLM adds a plugin's HTTP routes only when the plugin is named here.
            named = [name for name in environment.get("VLLM_PLUGINS", "").split(",") if name]
            environment["VLLM_PLUGINS"] = ",".join(dict.fromkeys([*named, PLUGIN_NAME]))
        if self._api_key is not None:
            # Not as an argument: those can be read by every user of the machine.
            environment["VLLM_API_KEY"] = self._api_key
        environment.update(self._environment)
        return environment

    def _wait_until_healthy(self) -> None:
        assert self._process is not None
        started = time.monotonic()
        with tqdm(
            desc=f"vllm serve {Path(self.model_name).name} is starting (often about a minute)",
            bar_format="{desc}: {elapsed}",
            disable=None,
        ) as progress:
            while not self._is_healthy():
                if self._process.poll() is not None:
                    raise ModelServerError(
                        f"vllm serve ended with status {self._process.returncode}", self.log_tail()
                    )
                if time.monotonic() - started > self._startup_timeout_s:
                    raise ModelServerError(
                        f"vllm serve did not answer within {self._startup_timeout_s:.0f} s",
                        self.log_tail(),
                    )
                time.sleep(0.25)
                progress.update(0)
                progress.refresh()

    def _is_healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self._root_url()}/health", timeout=5) as response:
                return bool(response.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def is_running(self) -> bool:
        """Whether the server's process is alive."""
        return self._process is not None and self._process.poll() is None

    def log_tail(self, lines: int = _LOG_TAIL_LINES) -> str:
        """The end of the server's log, and the errors before it.

        An error in the engine's process stands long before the end, which says only that there was
        one.
        """
        if self.log_path is None or not self.log_path.exists():
            return "(no log)"
        log = self.log_path.read_text(encoding="utf-8", errors="replace").splitlines()
        errors = dict.fromkeys(
            found.group() for line in log[:-lines] if (found := _ERROR.search(line))
        )
        return "\n".join([*errors, f"end of {self.log_path}:", *log[-lines:]])

    def stop(self) -> None:
        """Ends the server and every process it started; does nothing when it does not run."""
        atexit.unregister(self.stop)
        process, self._process, self._port = self._process, None, None
        if process is None:
            return
        assert process.stdin is not None
        process.stdin.close()  # the guard takes this as the parent's end
        # The guard ends in GRACE_S and a third of it, whatever its command does.
        process.wait(2 * child_guard.GRACE_S)

    def __enter__(self) -> ModelServerVLLM:
        """Starts the server."""
        return self.start()

    def __exit__(self, *exception: object) -> None:
        """Stops the server."""
        self.stop()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
