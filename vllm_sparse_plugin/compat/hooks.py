"""Hooks into vLLM; each says why no official extension point does."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from sparse_attention_hub.sparse_attention.serialization import config_to_json
from vllm_sparse_plugin.compat.batch_hooks import install_batch_hooks
from vllm_sparse_plugin.compat.cache_types import cache_dtype
from vllm_sparse_plugin.compat.engine import (
    attention_shape,
    current_vllm_config,
    is_selected,
    served_block_size,
    serving_config,
)
from vllm_sparse_plugin.compat.engine_checks import check_engine
from vllm_sparse_plugin.compat.graph_hooks import install_graph_hooks
from vllm_sparse_plugin.compat.replacing import MARK, replace_once
from vllm_sparse_plugin.paged.break_even import NEVER, break_even_of
from vllm_sparse_plugin.plugin_log import log_as_vllm
from vllm_sparse_plugin.prefix_cache import sparse_hash_keys
from vllm_sparse_plugin.request_parameters import MODE, RequestParameters, resolve_request
from vllm_sparse_plugin.serving_config import ServingConfig
from vllm_sparse_plugin.trial import try_maskers

if TYPE_CHECKING:
    from vllm.config import VllmConfig

BACKEND_PATH = "vllm_sparse_plugin.backend.SparseAttentionBackend"
DEVICE_BACKEND_PATH = "vllm_sparse_plugin.device_backend.DeviceAttentionBackend"
PAGED_BACKEND_PATH = "vllm_sparse_plugin.paged_backend.PagedAttentionBackend"
CUDA_LEAST_KEYS = 1024
"""Keys below which a query is dense on a GPU where `min_sparse_keys` is "auto"; from there on
workers decide in each step (`automatic_rows`).

The prefix cache has to know, without knowing the steps, which tokens are dense in any case: with
this, short conversations share all of their blocks. What is lost is small: 64 requests of 1,023
keys are 8.6 GB that a decode step of an 8B model reads besides 15 GB of weights.
"""
STATS_METHOD = "sparse_attention_stats"
LEAST_KEYS = "sparse_attention_least_keys"
"""Attribute of an engine's input processor: keys that a query must see to be sparse, by "auto";
None: none is sparse."""

logger = logging.getLogger(__name__)


def install() -> None:
    """Registers the backend and installs the hooks of this process, once."""
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    is_cuda = current_platform.is_cuda()
    # CUSTOM, not a name of our own: a new enum member does not unpickle in a process where the
    # plugin has not been loaded yet, and registering it twice raises.
    register_backend(AttentionBackendEnum.CUSTOM, DEVICE_BACKEND_PATH if is_cuda else BACKEND_PATH)
    _hook_request_admission()
    _hook_streamed_requests()
    _hook_block_hashes()
    _hook_cpu_backend_choice()
    _hook_worker_statistics()
    _hook_cache_allocation()
    if is_cuda:
        install_batch_hooks()
        install_graph_hooks()
        _hook_sleep()


def _hook_request_admission() -> None:
    """Validates the configuration at start-up, and each request's parameters at admission.

    `LogitsProcessor.validate_params` is the official place, but it is a class method that cannot
    see which engine it validates for: the server's defaults are needed here.
    """
    from vllm.exceptions import VLLMValidationError
    from vllm.v1.engine.input_processor import InputProcessor

    def wrap(original: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(original)
        def init(self: Any, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
            config = serving_config(vllm_config)
            shape, break_even, steps_decide = None, 0, False
            if config is not None:
                log_as_vllm()
                check_engine(vllm_config, config.fast_path)
                shape = attention_shape(vllm_config)
                if not config.attention.is_dense:
                    try_maskers(config_to_json(config.attention), shape)
                break_even = _break_even(vllm_config, config)
                steps_decide = decides_per_step(config)
            original(self, vllm_config, *args, **kwargs)
            setattr(self, LEAST_KEYS, None if break_even == NEVER else break_even)
            validate = self.validate_logits_processors_params

            def validate_and_resolve(params: Any) -> None:
                validate(params)
                try:
                    params.extra_args = resolve_request(
                        params.extra_args, config, break_even, steps_decide
                    )
                    resolved = RequestParameters.from_extra_args(params.extra_args)
                    if shape is not None and resolved is not None and resolved.config_json:
                        try_maskers(resolved.config_json, shape)
                except ValueError as error:
                    raise VLLMValidationError(str(error)) from error

            self.validate_logits_processors_params = validate_and_resolve

        return init

    replace_once(InputProcessor, "__init__", wrap)


def _hook_streamed_requests() -> None:
    """Refuses a request before its answer begins.

    vLLM looks at a request when the first token is asked for. Where answers are streamed, HTTP's
    status is 200 by then.
    """
    from vllm.v1.engine.async_llm import AsyncLLM

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def generate(
            self: Any, prompt: Any, sampling_params: Any, *args: Any, **kwargs: Any
        ) -> Any:
            given = getattr(sampling_params, "extra_args", None) or {}
            if any(name.startswith(MODE) for name in given):
                self.input_processor.validate_logits_processors_params(sampling_params)
            return original(self, prompt, sampling_params, *args, **kwargs)

        return generate

    replace_once(AsyncLLM, "generate", wrap)


def _break_even(vllm_config: VllmConfig, config: ServingConfig) -> int:
    """Keys from which on the server's maskers are worth their cost; on CPUs measured, if asked."""
    if not config.is_automatic:
        return 0
    if decides_per_step(config):
        return CUDA_LEAST_KEYS
    keys = break_even_of(
        config.attention,
        attention_shape(vllm_config),
        served_block_size(vllm_config),
        cache_dtype(vllm_config),
        config.imports,
    )
    longest = vllm_config.model_config.max_model_len
    if longest < keys < NEVER:
        logger.warning(
            "sparse attention: no sequence here is long enough (max_model_len %d) for maskers to "
            "cost less than dense attention: every query of requests without maskers of their own "
            "is dense (see min_sparse_keys)",
            longest,
        )
    return keys


def decides_per_step(config: ServingConfig) -> bool:
    """Whether workers decide in each step which rows attend densely."""
    from vllm.platforms import current_platform

    return config.is_automatic and bool(current_platform.is_cuda())


def _hook_block_hashes() -> None:
    """Keys blocks with sparsely attending tokens by the sparse configuration too.

    vLLM hashes LoRA, multimodal inputs and the salt, but no `extra_args`, and has no hook there.
    """
    from vllm.v1.core import block_pool, kv_cache_utils

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def generate(request: Any, start: int, end: int, mm_index: int) -> Any:
            keys, next_mm_index = original(request, start, end, mm_index)
            parameters = request.sampling_params
            sparse = sparse_hash_keys(
                parameters.extra_args if parameters is not None else None,
                request.num_prompt_tokens,
                start,
                end,
            )
            return ((*(keys or ()), *sparse) if sparse else keys), next_mm_index

        return generate

    # block_pool imports the function by name, so it is replaced in both modules.
    for module in (kv_cache_utils, block_pool):
        replace_once(module, "generate_block_hash_extra_keys", wrap)


def _hook_cpu_backend_choice() -> None:
    """Teaches the CPU platform to honour `--attention-backend CUSTOM`.

    It ignores every choice but its own; on CUDA the selector honours CUSTOM as it is.
    """
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    def wrap(original: Any) -> Any:
        choose = original.__func__

        @functools.wraps(choose)
        def get_attn_backend_cls(
            cls: Any, selected_backend: Any, attn_selector_config: Any, num_heads: Any = None
        ) -> str:
            if selected_backend is not AttentionBackendEnum.CUSTOM:
                return str(choose(cls, selected_backend, attn_selector_config, num_heads))
            backend = AttentionBackendEnum.CUSTOM.get_class()
            # The CUDA platform validates a chosen backend, the CPU platform does not.
            reasons = backend.validate_configuration(
                **attn_selector_config._asdict(), device_capability=None
            )
            if reasons:
                raise ValueError(
                    "--attention-backend CUSTOM (sparse attention) cannot serve this model: "
                    + "; ".join(reasons)
                )
            config = serving_config(current_vllm_config())
            is_paged = config is not None and config.fast_path
            return PAGED_BACKEND_PATH if is_paged else BACKEND_PATH

        return classmethod(get_attn_backend_cls)

    descriptor = CpuPlatform.__dict__["get_attn_backend_cls"]
    if not getattr(descriptor.__func__, MARK, False):
        replacement = wrap(descriptor)
        setattr(replacement.__func__, MARK, True)
        CpuPlatform.get_attn_backend_cls = replacement


def _hook_worker_statistics() -> None:
    """Gives workers the method that the HTTP route asks for density (`collective_rpc` by name)."""
    from vllm.v1.worker.worker_base import WorkerBase

    if hasattr(WorkerBase, STATS_METHOD):
        return

    def sparse_attention_stats(self: Any, tag: str | None = None) -> dict[str, Any] | None:
        from vllm_sparse_plugin.row_table import row_table

        return row_table(self.vllm_config).statistics.report(tag)

    setattr(WorkerBase, STATS_METHOD, sparse_attention_stats)


def _hook_sleep() -> None:
    """Takes in what the last step has counted before a worker's memory is taken from it.

    The counts lie in memory that sleep unmaps; who asks a sleeping server must not look there.
    """
    from vllm.v1.worker.gpu_worker import Worker

    def wrap(original: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(original)
        def sleep(self: Any, *args: Any, **kwargs: Any) -> None:
            from vllm_sparse_plugin.row_table import row_table

            if is_selected(self.vllm_config):
                row_table(self.vllm_config).statistics.settle()
            original(self, *args, **kwargs)

        return sleep

    replace_once(Worker, "sleep", wrap)


def _run_dummy_steps(vllm_config: VllmConfig) -> None:
    from vllm.platforms import current_platform

    config = serving_config(vllm_config)
    if config is None or not current_platform.is_cuda():
        return
    from vllm_sparse_plugin.compile_kernels import compile_kernels  # which needs vLLM's layers

    compile_kernels(vllm_config)
    if decides_per_step(config):
        from vllm_sparse_plugin import measure_costs  # which needs vLLM's layers

        measure_costs.measure_engine(vllm_config)


def require_own_layers(layers: Mapping[str, Any]) -> None:
    """Looks whether the backend that was chosen is that of any layer.

    Args:
        layers: Of an engine, by name.

    Raises:
        ValueError: Of none: the model has no attention, or chooses another backend by itself.
    """
    if not any(hasattr(getattr(layer, "impl", None), "can_be_sparse") for layer in layers.values()):
        raise ValueError(
            "--attention-backend CUSTOM (sparse attention) cannot serve this model: it has no "
            "attention layers, or has them choose a backend by themselves"
        )


def _hook_cache_allocation() -> None:
    """Looks at the caches as soon as there are any, before the first request.

    On CPUs, layers prepare them; on CUDA, kernels are compiled, and what steps cost is measured.
    vLLM tells backends of a cache only when a request's keys are written into it.
    """
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    def wrap(original: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(original)
        def initialize_from_config(self: Any, *args: Any, **kwargs: Any) -> None:
            original(self, *args, **kwargs)
            context = self.vllm_config.compilation_config.static_forward_context
            if is_selected(self.vllm_config):
                require_own_layers(context)
            layers = [
                layer
                for layer in context.values()
                if hasattr(getattr(layer, "impl", None), "prepare_cache")
            ]
            # Takes a second or two for each GiB.
            for layer in tqdm(layers, desc="sparse attention: preparing the cache", disable=None):
                layer.impl.prepare_cache(layer)
            _run_dummy_steps(self.vllm_config)

        return initialize_from_config

    replace_once(WorkerWrapperBase, "initialize_from_config", wrap)
