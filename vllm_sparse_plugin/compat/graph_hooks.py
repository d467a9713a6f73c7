"""Hooks into how vLLM captures and chooses CUDA graphs; each says why no extension point does.

A graph of a decode step that has maskers in it serves dense requests too, but their steps would pay
for launches that find nothing to do. So runner V2 gets two sets of graphs, and each step takes the
set that it needs. Steps whose maskers no graph has run without one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from vllm_sparse_plugin.compat.engine import is_selected
from vllm_sparse_plugin.compat.replacing import replace_once

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from vllm_sparse_plugin.row_table import RowTable


def install_graph_hooks() -> None:
    """Installs the hooks of both model runners, once."""
    from vllm.config.compilation import CUDAGraphMode
    from vllm.v1.cudagraph_dispatcher import CudagraphDispatcher
    from vllm.v1.worker.gpu.cudagraph_utils import ModelCudaGraphManager
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    replace_once(
        ModelCudaGraphManager,
        "capture",
        functools.partial(_capture_twice, full=CUDAGraphMode.FULL),
    )
    replace_once(ModelCudaGraphManager, "run_fullgraph", _choose_set)
    replace_once(GPUModelRunner, "gather_batch_req_state", _avoid_decode_graphs)
    replace_once(CudagraphDispatcher, "dispatch", _avoid_uniform_graphs)


def _table_of(vllm_config: VllmConfig) -> RowTable | None:
    """The engine's rows; None when its attention does not run through the plugin."""
    from vllm_sparse_plugin.row_table import row_table

    return row_table(vllm_config) if is_selected(vllm_config) else None


def _fits(table: RowTable, keys: Iterable[int]) -> bool:
    from vllm_sparse_plugin.graph_steps import fits_graphs

    return fits_graphs(table, keys)


def _capture_twice(original: Callable[..., None], full: Any) -> Callable[..., None]:
    """Runner V2: captures the graphs of decode steps a second time, with maskers."""

    @functools.wraps(original)
    def capture(self: Any, *arguments: Any, **named: Any) -> None:
        table = _table_of(self.vllm_config)
        if table is None:
            original(self, *arguments, **named)
            return
        graphs = table.graphs
        graphs.has_dense_graphs, graphs.captures_sparse, graphs.is_dummy = True, False, True
        original(self, *arguments, **named)
        descriptions, dense, samples = self._capture_descs, self.graphs, self._capture_mem_samples
        if graphs.config_json is None or full not in descriptions:
            return
        graphs.captures_sparse = True
        self.graphs, self._capture_descs = {}, {full: descriptions[full]}
        if samples is not None:
            self._capture_mem_samples = []
        named["progress_bar_desc"] = "Capturing CUDA graphs with sparse attention"
        try:
            original(self, *arguments, **named)
            self.sparse_attention_graphs = self.graphs
            if samples is not None:
                # vLLM extrapolates from samples of each size: both sets are needed of each.
                both = zip(samples, self._capture_mem_samples, strict=True)
                samples[:] = [first + second for first, second in both]
        finally:
            self.graphs, self._capture_descs = dense, descriptions
            self._capture_mem_samples = samples
            graphs.captures_sparse = False  # vLLM's own steps without requests take dense graphs

    return capture


def _choose_set(original: Callable[..., Any]) -> Callable[..., Any]:
    """Runner V2: replays the graph of the set that the planned step needs."""

    @functools.wraps(original)
    def run_fullgraph(self: Any, desc: Any) -> Any:
        table = _table_of(self.vllm_config)
        if table is None or not table.graphs.step_is_sparse:
            return original(self, desc)
        dense = self.graphs
        self.graphs = self.sparse_attention_graphs
        try:
            return original(self, desc)
        finally:
            self.graphs = dense

    return run_fullgraph


def _avoid_decode_graphs(original: Callable[..., Any]) -> Callable[..., Any]:
    """Runner V2: no graph of a whole decode step for maskers that none has, or that have to learn.

    What chooses graphs is told how many requests there are, not which. Here they are known, and
    what is decided here is what ranks of a data-parallel group tell each other.
    """

    @functools.wraps(original)
    def gather_batch_req_state(self: Any, scheduler_output: Any, dummy_run: bool) -> Any:
        state, uniform_token_count = original(self, scheduler_output, dummy_run)
        table = _table_of(self.vllm_config)
        if table is not None:
            table.graphs.is_dummy = dummy_run
            slots = self.req_states.req_id_to_index
            scheduled = () if dummy_run else scheduler_output.num_scheduled_tokens
            if not _fits(table, (slots[request] for request in scheduled)):
                # As for a batch whose requests have different numbers of queries.
                uniform_token_count = None
        return state, uniform_token_count

    return gather_batch_req_state


def _avoid_uniform_graphs(original: Callable[..., Any]) -> Callable[..., Any]:
    """Runner V1: likewise; its table holds the rows of the batch, and of no other."""

    @functools.wraps(original)
    def dispatch(
        self: Any, num_tokens: int, uniform_decode: bool = False, *arguments: Any, **named: Any
    ) -> Any:
        table = _table_of(self.vllm_config)
        if uniform_decode and table is not None and not _fits(table, table.rows):
            uniform_decode = False
        return original(self, num_tokens, uniform_decode, *arguments, **named)

    return dispatch
