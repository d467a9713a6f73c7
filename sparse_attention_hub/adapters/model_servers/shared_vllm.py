"""The vLLM servers that adapters of this process share: one per description, counted."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from sparse_attention_hub.adapters.model_servers.shared import SharedResources
from sparse_attention_hub.adapters.model_servers.vllm import ModelServerVLLM


@dataclass
class ServerEntry:
    """A server that several adapters use.

    Attributes:
        server: Started.
        reference_count: Its users.
        last_access_time: When it was last handed out.
    """

    server: ModelServerVLLM
    reference_count: int = 0
    last_access_time: datetime = field(default_factory=datetime.now)


_SERVERS: SharedResources[ServerEntry] = SharedResources(
    "vLLM server", lambda entry: entry.server.stop()
)


def acquire_server(description: ModelServerVLLM) -> ModelServerVLLM:
    """The process's server that is described so, with one user more; started on first use.

    Args:
        description: Not started; it becomes the shared server if there is none of its `key`.

    Raises:
        ServerConnectionError: The shared server died; with its log. It is not started again before
            all its users have let go.
        ModelServerError: See `ModelServerVLLM.start`.
    """
    key = description.key
    server = _SERVERS.acquire(key, lambda: ServerEntry(description.start())).server
    try:
        return server.start()  # an error if it died meanwhile
    except BaseException:
        release_server(server)
        raise


def release_server(server: ModelServerVLLM) -> None:
    """One user less; the last one's release stops the server.

    Raises:
        ReferenceCountError: It has no users.
        ResourceCleanupError: It does not end.
    """
    _SERVERS.release(server.key, delete_on_zero=True)


def get_server_stats() -> dict[str, Any]:
    """The shared servers: total_servers, total_references, server_keys."""
    total, references, _, keys = _SERVERS.stats()
    return {"total_servers": total, "total_references": references, "server_keys": keys}
