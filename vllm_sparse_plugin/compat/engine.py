"""What an engine's configuration says, and vLLM's own classes that the plugin builds on."""

from __future__ import annotations

import copy
import os
import weakref
from typing import TYPE_CHECKING, Any

from vllm_sparse_plugin.compat.cache_types import element_type
from vllm_sparse_plugin.serving_config import NAMESPACE, ServingConfig
from vllm_sparse_plugin.trial import AttentionShape

if TYPE_CHECKING:
    from vllm.config import CompilationConfig, VllmConfig
    from vllm.v1.attention.backend import AttentionBackend, AttentionImpl, AttentionMetadataBuilder
    from vllm.v1.kv_cache_interface import AttentionSpec

    from vllm_sparse_plugin.paged.layout import BlockLayout, BlockShape

_CPU_BLOCK_SIZE = 128
"""What both versions ask the CPU backend for where the user says nothing."""


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


def block_shape(spec: AttentionSpec, vllm_config: VllmConfig) -> BlockShape:
    """The shape of a layer's cache in a worker of this engine."""
    from vllm_sparse_plugin.paged.layout import BlockShape  # which imports this package

    return BlockShape(
        block_size=spec.block_size,
        num_heads=attention_shape(vllm_config).num_heads,
        num_kv_heads=spec.num_kv_heads,
        head_size=spec.head_size,
        dtype=element_type(spec.dtype),
    )


def check_blocks(spec: AttentionSpec, layout: BlockLayout | None) -> None:
    """Looks whether a group's blocks have room for the index.

    vLLM makes blocks of all layers equally large where layers have caches of different sizes, by
    more tokens or by padding. More tokens pass here, if they have as many bytes each.

    Args:
        spec: Of the layers, as their caches are made.
        layout: Of blocks of so many tokens; None: of layers without an index.

    Raises:
        ValueError: They have not, or are padded.
    """
    needed = layout.bytes_per_token if layout is not None else 0
    if spec.page_size_padded is not None or spec.state_content_size_bytes < needed:
        raise ValueError(
            "--attention-backend CUSTOM (sparse attention): layers of this model have KV caches of "
            f"different sizes, so that vLLM pads blocks (to {spec.page_size_bytes} bytes for "
            f"{spec.block_size} tokens), which is not supported"
        )


def served_block_size(vllm_config: VllmConfig) -> int:
    """Tokens of a block in the workers of this engine, on a CPU.

    vLLM 0.32 writes its choice into every process's configuration. 0.33 chooses in the workers,
    after the model is loaded; elsewhere the configuration then still holds a general default.
    """
    cache = vllm_config.cache_config
    if cache.user_specified_block_size:
        return int(cache.block_size)
    backend, _, _ = dense_backend()
    return int(backend.get_preferred_block_size(_CPU_BLOCK_SIZE))


def window_restricts(window: int | None, vllm_config: VllmConfig) -> bool:
    """Whether a sliding window ever hides a key; some models have one longer than themselves.

    As the in-process adapter decides it, and never less than what this engine can serve.
    """
    if window is None:
        return False
    model = vllm_config.model_config
    positions = getattr(model.hf_text_config, "max_position_embeddings", 0)
    return bool(window < max(model.max_model_len, positions))


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
        return _cuda_dense_backend()
    raise RuntimeError(
        f"vllm_sparse_plugin supports CPU and CUDA, not {current_platform.device_name}"
    )


DENSE_BACKEND = "SPARSE_ATTENTION_DENSE_BACKEND"


def _cuda_dense_backend() -> tuple[
    type[AttentionBackend], type[AttentionMetadataBuilder[Any]], type[AttentionImpl[Any]]
]:
    """FlashAttention where its library runs on the device, else vLLM's Triton kernel.

    The environment variable `SPARSE_ATTENTION_DENSE_BACKEND` chooses one of them. (No configuration
    can: vLLM asks for the class before there is one.)
    """
    chosen = os.environ.get(DENSE_BACKEND) or _default_dense_backend()
    if chosen == "FLASH_ATTN":
        from vllm.v1.attention.backends import flash_attn

        return (
            flash_attn.FlashAttentionBackend,
            flash_attn.FlashAttentionMetadataBuilder,
            flash_attn.FlashAttentionImpl,
        )
    if chosen == "TRITON_ATTN":
        from vllm.v1.attention.backends import triton_attn

        return (
            triton_attn.TritonAttentionBackend,
            triton_attn.TritonAttentionMetadataBuilder,
            triton_attn.TritonAttentionImpl,
        )
    raise RuntimeError(f"{DENSE_BACKEND} must be FLASH_ATTN or TRITON_ATTN, got {chosen!r}")


def _default_dense_backend() -> str:
    try:
        from vllm.v1.attention.backends.fa_utils import get_flash_attn_version

        is_there = get_flash_attn_version() is not None
    except (ImportError, OSError, AssertionError):
        is_there = False
    return "FLASH_ATTN" if is_there else "TRITON_ATTN"


def device_type() -> str:
    """Torch's name of the devices of this platform."""
    from vllm.platforms import current_platform

    return str(current_platform.device_type)


def processor_bases() -> tuple[type, ...]:
    """The base classes of a request-parameter processor: one class must serve both runners.

    The V2 runner refuses a class that is not its own kind, the V1 runner calls the V1 interface.
    """
    from vllm.v1.sample.logits_processor import LogitsProcessor as ProcessorV1
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as ProcessorV2

    return (ProcessorV1, ProcessorV2)


def identity(vllm_config: VllmConfig) -> CompilationConfig:
    """What an engine's configuration shares with its copies, and with no other engine's.

    vLLM builds parts of some models (what is inside a multimodal one, a draft) with copies of the
    configuration. All of an engine's layers register in this one object.
    """
    return vllm_config.compilation_config


_ENGINES: dict[int, VllmConfig] = {}
_OWNERS: dict[int, weakref.ref[CompilationConfig]] = {}
"""By the `id` of an engine."""


def engine_of(vllm_config: VllmConfig) -> VllmConfig:
    """One configuration for all copies of an engine's, which layers may hold.

    It has no `compilation_config`, which refers to the layers, and is the same object as long as
    the engine lives.
    """
    owner = identity(vllm_config)
    if id(owner) not in _ENGINES:
        engine = copy.copy(vllm_config)
        engine.compilation_config = None
        _ENGINES[id(owner)], _OWNERS[id(engine)] = engine, weakref.ref(owner)
        weakref.finalize(owner, _ENGINES.pop, id(owner), None)
        weakref.finalize(owner, _OWNERS.pop, id(engine), None)
    return _ENGINES[id(owner)]


def implementations(engine: VllmConfig) -> dict[str, Any]:
    """The implementations of the attention layers that an engine has in this worker, by name.

    Layers of other kinds, such as recurrent ones, have none.

    Args:
        engine: See `engine_of`.
    """
    owner = _OWNERS[id(engine)]()
    layers = owner.static_forward_context if owner is not None else {}
    return {name: layer.impl for name, layer in layers.items() if hasattr(layer, "impl")}


_engine_being_built: weakref.ref[VllmConfig] | None = None


def remember_engine_being_built() -> VllmConfig:
    """The engine whose layers are made now (see `engine_of`), for `engine_being_built`."""
    global _engine_being_built
    engine = engine_of(current_vllm_config())
    _engine_being_built = weakref.ref(engine)
    return engine


def engine_being_built() -> VllmConfig:
    """The engine whose layers were made last in this process (see `engine_of`).

    vLLM asks a backend for its blocks outside the context in which `current_vllm_config` works;
    engines of one process are built one after the other.

    Raises:
        RuntimeError: No layer was made yet, or its engine is gone.
    """
    engine = _engine_being_built() if _engine_being_built is not None else None
    if engine is None:
        raise RuntimeError("no engine of this process uses the sparse attention backend")
    return engine


def of_first_rank(value: Any) -> Any:
    """What the first rank of the tensor parallel group has called this with; all ranks call it."""
    from vllm.distributed.parallel_state import get_tp_group

    return get_tp_group().broadcast_object(value, src=0)


def current_vllm_config() -> VllmConfig:
    """The configuration of the engine whose model is being built."""
    from vllm.config import get_current_vllm_config

    return get_current_vllm_config()
