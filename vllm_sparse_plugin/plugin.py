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
    from vllm_sparse_plugin.plugin_log import log_as_vllm

    compat.check_vllm_version()
    log_as_vllm()
    compat.install()
