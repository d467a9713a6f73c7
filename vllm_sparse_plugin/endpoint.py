"""`GET /sparse_attention/stats`: the active configuration and the measured density.

vLLM adds HTTP routes only for plugins named in `VLLM_PLUGINS`:
`VLLM_PLUGINS=sparse_attention vllm serve ...`.
"""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, HTTPException

from sparse_attention_hub.sparse_attention.serialization import config_fingerprint
from vllm_sparse_plugin import compat
from vllm_sparse_plugin.serving_config import ServingConfig
from vllm_sparse_plugin.statistics import ReadCount

if TYPE_CHECKING:
    from argparse import Namespace

    from starlette.datastructures import State
    from vllm.engine.protocol import EngineClient

ROUTE = "/sparse_attention/stats"
_SAME_IN_ALL_WORKERS = (
    "sparse_queries",
    "dense_queries",
    "automatic_dense_queries",
    "fallback_queries",
    "general_rows",
)


class SparseAttentionEndpoint:
    """vLLM's `EndpointPlugin` protocol."""

    name = "sparse_attention"
    required_tasks = ("generate",)

    def __init__(self) -> None:
        """Starts without an engine; `init_state` brings it."""
        self._engine: EngineClient | None = None
        self._config: ServingConfig | None = None
        self._least_keys: int | None = None

    def attach_router(self, app: FastAPI) -> None:
        """Adds the route."""
        app.add_api_route(ROUTE, self.stats, methods=["GET"])

    async def init_state(
        self, engine_client: EngineClient | None, state: State, args: Namespace
    ) -> None:
        """Takes the engine and its configuration."""
        self._engine = engine_client
        if engine_client is not None:
            self._config = compat.serving_config(engine_client.vllm_config)
        if engine_client is not None and self._config is not None:
            least = self._config.min_sparse_keys
            processor = getattr(engine_client, "input_processor", None)  # of vLLM's own engine
            measured: int | None = getattr(processor, compat.LEAST_KEYS, None)
            self._least_keys = measured if least == "auto" else least

    async def stats(self, tag: str | None = None) -> dict[str, Any]:
        """The counts of one tagged request, or the configuration and all counts.

        `min_sparse_keys` is the number that "auto" has come to: on CUDA, where steps decide, keys
        below which a query is dense in any of them. None: the server's maskers never pay
        (or it is not known: the engine is none of vLLM's own).

        Raises:
            HTTPException: 404 where the backend is not selected, or the tag was never seen.
        """
        if self._engine is None or self._config is None:
            raise HTTPException(404, "this server does not run --attention-backend CUSTOM")
        reports = await self._engine.collective_rpc(compat.STATS_METHOD, args=(tag,))
        report = merge_reports(reports)
        if tag is None:
            return {
                "config": self._config.to_dict(),
                "fingerprint": config_fingerprint(self._config.attention),
                "min_sparse_keys": self._least_keys,
                "totals": report,
            }
        if report is None:
            raise HTTPException(404, f"no request with the tag {tag!r} has run")
        return {"tag": tag, **report}


def merge_reports(reports: list[dict[str, Any] | None]) -> dict[str, Any] | None:
    """One report of all tensor-parallel workers: same queries, different heads.

    Args:
        reports: `Statistics.report` of each worker.

    Returns:
        None when a worker has none.
    """
    known = [report for report in reports if report is not None]
    if not known or len(known) < len(reports):
        return None
    counts = {field.name: [report[field.name] for report in known] for field in fields(ReadCount)}
    merged = {
        name: of_workers[0] if name in _SAME_IN_ALL_WORKERS else sum(of_workers)
        for name, of_workers in counts.items()
    }
    return ReadCount(**merged).report()


def create_endpoint_plugin() -> SparseAttentionEndpoint:
    """The `vllm.endpoint_plugins` entry point."""
    return SparseAttentionEndpoint()
