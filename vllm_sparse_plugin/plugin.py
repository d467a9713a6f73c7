"""The `vllm.general_plugins` entry point: what vLLM calls in each of its processes."""

from __future__ import annotations

import logging
import os

logger = logging.getLogger(__name__)

KILL_SWITCH = "SPARSE_ATTENTION_PLUGIN_DISABLED"
"""Environment variable: set to 1, the installed plugin does nothing at all."""


def register() -> None:
    """Makes the backend selectable in this process; idempotent, called by vLLM several times.

    Nothing changes for a server that does not select the backend: the hooks installed here look
    at the engine's configuration first and hand over to vLLM's own code.

    Raises:
        RuntimeError: The installed vLLM is outside the tested range.
    """
    if os.environ.get(KILL_SWITCH) == "1":
        logger.info("%s=1: the sparse attention plugin is off", KILL_SWITCH)
        return
    # Imported here: the entry point must be cheap in processes that never run attention.
    from vllm_sparse_plugin import compat

    compat.check_vllm_version()
    _log_as_vllm()
    compat.install()


def _log_as_vllm() -> None:
    """Sends what the plugin logs where vLLM's own log goes, unless the process has a log itself.

    vLLM gives handlers to its own loggers alone; without any, Python shows warnings only.
    """
    own, vllm = logging.getLogger(__package__), logging.getLogger("vllm")
    if own.handlers or logging.getLogger().handlers:
        return
    for handler in vllm.handlers:
        own.addHandler(handler)
    if vllm.handlers and own.level == logging.NOTSET:
        own.setLevel(vllm.level)
