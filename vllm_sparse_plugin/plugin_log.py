"""Where the plugin's log goes."""

from __future__ import annotations

import logging


def log_as_vllm() -> None:
    """Sends what the plugin logs where vLLM's own log goes, unless the process has a log itself.

    vLLM gives handlers to its own loggers alone; without any, Python shows warnings only. It may
    come to do so after plugins were loaded (the API server does): whoever logs at start-up asks
    again.
    """
    own, vllm = logging.getLogger(__package__), logging.getLogger("vllm")
    if own.handlers or logging.getLogger().handlers:
        return
    for handler in vllm.handlers:
        own.addHandler(handler)
    if vllm.handlers and own.level == logging.NOTSET:
        own.setLevel(vllm.level)
