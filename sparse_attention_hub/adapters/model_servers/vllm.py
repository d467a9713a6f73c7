"""`ModelServerVLLM`: a vLLM server, started as a child of this process or found at a URL.

vLLM's engine loads and keeps the model; nothing here imports vLLM.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sparse_attention_hub.adapters.model_servers.guarded_process import GuardedProcess
from sparse_attention_hub.adapters.utils.exceptions import (
    ModelServerError,
    ServerConnectionError,
    ServerTimeoutError,
)

PLUGIN_NAME = "sparse_attention"


class ModelServerVLLM:
    """Starts `vllm serve` on a free loopback port and ends it with all its processes, or attaches.

    A server that was started ends when `stop` is called, at the end of a `with` block, and when
    this process ends, however it ends. One that is attached to is left alone. Nothing is ever
    restarted by itself: a server that died is an error with its log.

    Attributes:
        model_name: Name or folder; also the name under which a started server serves it.
        api_key: That clients must send; None = none.
    """

    def __init__(
        self,
        model_name: str,
        sparse_attention: Mapping[str, Any] | str | None = None,
        *,
        base_url: str | None = None,
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
            base_url: Of a running server to attach to, such as "http://127.0.0.1:8000/v1"; None =
                start one.
            arguments: Further arguments of `vllm serve`.
            environment: Further environment variables.
            api_key: That clients must send.
            startup_timeout_s: Seconds to wait for the server to answer.

        Raises:
            ValueError: `base_url` is not one, or stands beside what only a start needs.
        """
        if base_url is not None and (sparse_attention is not None or arguments or environment):
            raise ValueError(
                "base_url attaches to a running server; sparse_attention, arguments and "
                "environment are for one that is started"
            )
        if base_url is not None and not base_url.startswith(("http://", "https://")):
            raise ValueError(f"base_url must begin with http:// or https://, got {base_url!r}")
        self.model_name = model_name
        self.api_key = api_key
        self._sparse_attention = sparse_attention
        self._arguments = list(arguments)
        self._environment = dict(environment or {})
        self._startup_timeout_s = startup_timeout_s
        self._attached_url = base_url
        self._root_url = base_url and base_url.rstrip("/").removesuffix("/v1")
        self._process: GuardedProcess | None = None

    @property
    def key(self) -> str:
        """Equal for servers that are described equally; does not show the API key."""
        described = [
            self._attached_url,
            self._sparse_attention,
            self._arguments,
            self._environment,
            self.api_key,
        ]
        text = json.dumps(described, sort_keys=True)
        return f"{self.model_name}|{hashlib.sha256(text.encode()).hexdigest()[:16]}"

    @property
    def root_url(self) -> str:
        """Of the server, without "/v1".

        Raises:
            ModelServerError: The server was not started, or was stopped.
        """
        if self._root_url is None:
            raise ModelServerError("the vLLM server is not running", self.model_name)
        return self._root_url

    @property
    def base_url(self) -> str:
        """Of the OpenAI-compatible API; raises as `root_url`."""
        return f"{self.root_url}/v1"

    @property
    def log_path(self) -> Path | None:
        """What a started server writes; stays readable after its end."""
        return self._process.log_path if self._process else None

    def start(self) -> ModelServerVLLM:
        """Starts the server and waits until it answers; does nothing when it runs.

        Raises:
            ServerConnectionError: It died since it was started (`stop` it to start it again), or
                there is none at the URL to attach to.
            ServerTimeoutError: It does not answer in time.
            ModelServerError: It ends before it answers. All three with the end of its log.
        """
        if self._root_url is not None:
            if not self.is_running():
                raise ServerConnectionError(
                    f"the vLLM server at {self._root_url} is gone", self.log_tail()
                )
            return self
        # Bound and not listening until the server listens: nobody else gets the port meanwhile.
        with socket.socket() as reservation:
            reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            reservation.bind(("127.0.0.1", 0))
            port = reservation.getsockname()[1]
            self._root_url = f"http://127.0.0.1:{port}"
            self._process = GuardedProcess(
                self._command(port), self._child_environment(), "vllm-serve"
            )
            try:
                self._wait_until_healthy(self._process)
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
        if self.api_key is not None:
            # Not as an argument: those can be read by every user of the machine.
            environment["VLLM_API_KEY"] = self.api_key
        environment.update(self._environment)
        return environment

    def _wait_until_healthy(self, process: GuardedProcess) -> None:
        started = time.monotonic()
        with tqdm(
            desc=f"vllm serve {Path(self.model_name).name} is starting (often about a minute)",
            bar_format="{desc}: {elapsed}",
            disable=None,
        ) as progress:
            while not self.is_healthy():
                if process.exit_status is not None:
                    raise ModelServerError(
                        f"vllm serve ended with status {process.exit_status}", self.log_tail()
                    )
                if time.monotonic() - started > self._startup_timeout_s:
                    raise ServerTimeoutError(
                        f"vllm serve did not answer within {self._startup_timeout_s:.0f} s",
                        self.log_tail(),
                    )
                time.sleep(0.25)
                progress.update(0)
                progress.refresh()

    def is_healthy(self) -> bool:
        """Whether the server answers, and its engine is alive."""
        try:
            with urllib.request.urlopen(f"{self.root_url}/health", timeout=5) as response:
                return bool(response.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def is_running(self) -> bool:
        """Whether the process of a started server is alive; an attached one must answer."""
        if self._attached_url is not None:
            return self.is_healthy()
        return (
            self._root_url is not None
            and self._process is not None
            and self._process.exit_status is None
        )

    def log_tail(self) -> str:
        """The end of a started server's log, and the errors before it; "" for an attached one."""
        return self._process.log_tail() if self._process else ""

    def stop(self) -> None:
        """Ends a started server and every process it started; leaves an attached one alone."""
        if self._attached_url is None:
            self._root_url = None
        if self._process is not None:
            self._process.stop()

    def __enter__(self) -> ModelServerVLLM:
        """Starts the server."""
        return self.start()

    def __exit__(self, *exception: object) -> None:
        """Stops the server."""
        self.stop()
