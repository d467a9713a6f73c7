"""What the plugin assumes about vLLM, as a table; `test_vllm_symbols.py` checks it against sources.

Places are written `module:name` and `module:Class.member`. What the CUDA path builds on
is in `vllm_cuda_symbols`.
"""

from __future__ import annotations

READ_RELEASE = "0.33.0"
"""Besides the installed vLLM, the release whose sources are read (its CUDA wheel)."""

BACKEND = "vllm.v1.attention.backend"
_CPU = "vllm.v1.attention.backends.cpu_attn"
_FLASH = "vllm.v1.attention.backends.flash_attn"
_TRITON = "vllm.v1.attention.backends.triton_attn"
_PROCESSOR_V1 = "vllm.v1.sample.logits_processor"
_PROCESSOR_V2 = "vllm.v1.worker.gpu.sample.logits_processor"
_GRAPHS = "vllm.v1.worker.gpu.cudagraph_utils"

NAMES: dict[str, tuple[str, ...]] = {
    "vllm": ("_custom_ops",),
    "vllm.config": (
        "AttentionConfig",
        "CacheConfig",
        "CompilationConfig",
        "ModelConfig",
        "ParallelConfig",
        "VllmConfig",
        "get_current_vllm_config",
        "get_layers_from_vllm_config",
    ),
    "vllm.config.cache": ("CacheDType",),
    "vllm.engine.protocol": ("EngineClient",),
    "vllm.exceptions": ("VLLMValidationError",),
    "vllm.model_executor.layers.attention": ("Attention",),
    "vllm.model_executor.models.utils": ("extract_layer_index",),
    "vllm.platforms": ("current_platform",),
    "vllm.platforms.cpu": ("CpuPlatform",),
    "vllm.plugins.endpoint_plugins.interface": ("EndpointPlugin",),
    "vllm.sampling_params": ("SamplingParams",),
    BACKEND: (
        "AttentionBackend",
        "AttentionCGSupport",
        "AttentionImpl",
        "AttentionMetadataBuilder",
        "AttentionType",
        "CommonAttentionMetadata",
    ),
    "vllm.v1.attention.backends": ("cpu_attn", "flash_attn", "triton_attn"),
    "vllm.v1.attention.backends.registry": ("AttentionBackendEnum", "register_backend"),
    "vllm.v1.core": ("block_pool", "kv_cache_utils"),
    "vllm.v1.engine.async_llm": ("AsyncLLM",),
    "vllm.v1.core.block_pool": ("generate_block_hash_extra_keys",),
    "vllm.v1.core.kv_cache_utils": ("generate_block_hash_extra_keys", "get_request_block_hasher"),
    "vllm.v1.engine.input_processor": ("InputProcessor",),
    "vllm.v1.kv_cache_interface": ("AttentionSpec", "FullAttentionSpec"),
    "vllm.v1.request": ("Request",),
    _PROCESSOR_V1: ("BatchUpdate", "LogitsProcessor", "process_dict_updates"),
    "vllm.v1.worker.worker_base": ("WorkerBase", "WorkerWrapperBase"),
}
"""What is imported, by module."""

IMPL = (
    "head_size",
    "kv_sharing_target_layer_name",
    "num_heads",
    "num_kv_heads",
    "scale",
    "sinks",
)

MEMBERS: dict[str, tuple[str, ...]] = {
    "vllm.config:AttentionConfig": ("backend", "backend_per_kind"),
    "vllm.config:CacheConfig": (
        "block_size",
        "cache_dtype",
        "kv_cache_dtype_skip_layers",
        "kv_sharing_fast_prefill",
        "user_specified_block_size",
    ),
    "vllm.config:CompilationConfig": (
        "static_forward_context",
        "cudagraph_mode",
        "max_cudagraph_capture_size",
    ),
    "vllm.config:ModelConfig": (
        "attention_chunk_size",
        "dtype",
        "enable_prompt_embeds",
        "hf_text_config",
        "max_model_len",
    ),
    "vllm.config:ParallelConfig": (
        "decode_context_parallel_size",
        "pipeline_parallel_size",
        "prefill_context_parallel_size",
    ),
    "vllm.config:VllmConfig": (
        "additional_config",
        "attention_config",
        "cache_config",
        "compilation_config",
        "kv_transfer_config",
        "model_config",
        "parallel_config",
        "speculative_config",
    ),
    "vllm.engine.protocol:EngineClient": ("vllm_config",),
    "vllm.v1.engine.async_llm:AsyncLLM": ("input_processor",),
    "vllm.model_executor.layers.attention:Attention": ("impl", "kv_cache", "layer_name"),
    "vllm.plugins.endpoint_plugins.interface:EndpointPlugin": ("name", "required_tasks"),
    "vllm.sampling_params:SamplingParams": ("extra_args",),
    "vllm.v1.request:Request": ("num_prompt_tokens", "sampling_params"),
    "vllm.v1.worker.worker_base:WorkerBase": ("vllm_config",),
    "vllm.v1.worker.worker_base:WorkerWrapperBase": ("vllm_config",),
    f"{BACKEND}:AttentionBackend": (
        "forward_includes_kv_cache_update",
        "is_sparse",
        "supported_kv_cache_dtypes",
    ),
    f"{BACKEND}:AttentionCGSupport": ("ALWAYS", "NEVER", "UNIFORM_BATCH"),
    f"{BACKEND}:AttentionMetadataBuilder": ("_cudagraph_support", "supports_update_block_table"),
    f"{BACKEND}:AttentionType": ("DECODER",),
    f"{BACKEND}:CommonAttentionMetadata": (
        "query_start_loc",
        "query_start_loc_cpu",
        "seq_lens",
        "seq_lens_cpu_upper_bound",
        "num_reqs",
        "num_actual_tokens",
        "max_query_len",
        "max_seq_len",
        "block_table_tensor",
        "slot_mapping",
        "positions",
        "is_prefilling",
        "req_idx",
        "_num_computed_tokens_cache",
        "_token_to_req_indices_cache",
    ),
    "vllm.v1.attention.backends.registry:AttentionBackendEnum": ("CUSTOM",),
    f"{_CPU}:CPUAttentionBackendImpl": IMPL,
    "vllm.v1.kv_cache_interface:AttentionSpec": (
        "block_size",
        "dtype",
        "head_size",
        "num_kv_heads",
        "page_size_bytes",
        "page_size_padded",
        "state_content_bytes",
    ),
    f"{_PROCESSOR_V1}:BatchUpdate": ("added", "moved", "removed"),
}
"""Attributes, fields and enum members that are read or set, by class."""

IMPL_ARGUMENTS = (
    "num_heads, head_size, scale, num_kv_heads, alibi_slopes, sliding_window, kv_cache_dtype, "
    "logits_soft_cap, attn_type, kv_sharing_target_layer_name, ..."
)

CALLED: dict[str, str] = {
    "vllm._custom_ops:cpu_attn_get_scheduler_metadata": (
        "*, num_reqs, num_heads, num_kv_heads, head_dim, seq_lens, dtype, query_start_loc, causal, "
        "sliding_window_size, isa, enable_kv_split"
    ),
    "vllm._custom_ops:cpu_attention_with_kv_cache": (
        "*, query, key_cache, value_cache, output, query_start_loc, seq_lens, scale, causal, "
        "alibi_slopes, sliding_window, block_table, softcap, scheduler_metadata, s_aux"
    ),
    "vllm._custom_ops:cpu_attn_reshape_and_cache": (
        "key, value, key_cache, value_cache, slot_mapping, isa"
    ),
    "vllm.config:get_current_vllm_config": "",
    "vllm.config:get_layers_from_vllm_config": "vllm_config, layer_type, layer_names",
    "vllm.config:ModelConfig.get_head_size": "",
    "vllm.config:ModelConfig.get_num_attention_heads": "parallel_config",
    "vllm.config:ModelConfig.get_num_kv_heads": "parallel_config",
    "vllm.config:ModelConfig.get_num_layers": "parallel_config",
    "vllm.engine.protocol:EngineClient.collective_rpc": "method, *, args",
    "vllm.exceptions:VLLMValidationError.__init__": "message",
    "vllm.model_executor.models.utils:extract_layer_index": "layer_name",
    "vllm.platforms.cpu:CpuPlatform.import_kernels": "",
    "vllm.platforms.interface:Platform.is_cpu": "",
    "vllm.platforms.interface:Platform.is_cuda": "",
    f"{BACKEND}:AttentionBackend.get_preferred_block_size": "default_block_size",
    "vllm.v1.attention.backends.registry:AttentionBackendEnum.get_class": "",
    "vllm.v1.attention.backends.registry:register_backend": "backend, class_path",
    "vllm.v1.engine.async_llm:AsyncLLM.generate": "prompt, sampling_params, ...",
    "vllm.v1.engine.input_processor:InputProcessor.__init__": "vllm_config, ...",
    # That it has an effect: tests/e2e/test_long_workload.py.
    "vllm.v1.worker.worker_base:WorkerWrapperBase.initialize_from_config": "...",
    f"{_PROCESSOR_V1}:process_dict_updates": "req_entries, batch_update, new_state",
    f"{_CPU}:_get_attn_isa": "dtype, block_size, head_size, kv_cache_dtype",
    f"{_CPU}:CPUAttentionBackendImpl.__init__": IMPL_ARGUMENTS,
}
"""How functions are called; see `objections_to_call`."""

BUILDER_ARGUMENTS = "self, kv_cache_spec, layer_names, vllm_config, device"
BUILD_ARGUMENTS = "self, common_prefix_len, common_attn_metadata, fast_build"
FORWARD_ARGUMENTS = (
    "self, layer, query, key, value, kv_cache, attn_metadata, output, output_scale, "
    "output_block_scale"
)
UPDATE_ARGUMENTS = "self, layer, key, value, kv_cache, slot_mapping"

REPLACED: dict[str, str] = {
    "vllm.platforms.cpu:CpuPlatform.get_attn_backend_cls": (
        "cls, selected_backend, attn_selector_config, num_heads"
    ),
    "vllm.plugins.endpoint_plugins.interface:EndpointPlugin.attach_router": "self, app",
    "vllm.plugins.endpoint_plugins.interface:EndpointPlugin.init_state": (
        "self, engine_client, state, args"
    ),
    f"{BACKEND}:AttentionBackend.customize_spec": "cls, spec",
    f"{BACKEND}:AttentionBackend.get_builder_cls": "",
    f"{BACKEND}:AttentionBackend.get_impl_cls": "",
    f"{BACKEND}:AttentionBackend.get_name": "",
    f"{BACKEND}:AttentionBackend.supports_alibi_sqrt": "cls",
    f"{BACKEND}:AttentionBackend.supports_attn_type": "cls, attn_type",
    f"{BACKEND}:AttentionBackend.supports_kv_connector": "cls",
    f"{BACKEND}:AttentionBackend.supports_mm_prefix": "cls",
    f"{BACKEND}:AttentionBackend.supports_non_causal": "cls",
    f"{BACKEND}:AttentionBackend.supports_per_head_quant_scales": "cls",
    f"{BACKEND}:AttentionBackend.supports_rswa": "cls",
    f"{BACKEND}:AttentionBackend.supports_sink": "cls",
    f"{BACKEND}:AttentionMetadataBuilder.__init__": BUILDER_ARGUMENTS,
    f"{BACKEND}:AttentionMetadataBuilder.build": BUILD_ARGUMENTS,
    f"{BACKEND}:AttentionImpl.forward": FORWARD_ARGUMENTS,
    f"{_CPU}:CPUAttentionMetadataBuilder.__init__": BUILDER_ARGUMENTS,
    f"{_CPU}:CPUAttentionMetadataBuilder.build": BUILD_ARGUMENTS,
    f"{_CPU}:CPUAttentionBackendImpl.forward": FORWARD_ARGUMENTS,
    f"{_CPU}:CPUAttentionBackendImpl.do_kv_cache_update": UPDATE_ARGUMENTS,
    "vllm.v1.core.block_pool:generate_block_hash_extra_keys": (
        "request, start_token_idx, end_token_idx, start_mm_idx"
    ),
    "vllm.v1.core.kv_cache_utils:generate_block_hash_extra_keys": (
        "request, start_token_idx, end_token_idx, start_mm_idx"
    ),
    f"{_PROCESSOR_V1}:LogitsProcessor.__init__": "self, vllm_config, device, is_pin_memory",
    f"{_PROCESSOR_V1}:LogitsProcessor.apply": "self, logits",
    f"{_PROCESSOR_V1}:LogitsProcessor.is_argmax_invariant": "self",
    f"{_PROCESSOR_V1}:LogitsProcessor.update_state": "self, batch_update",
    f"{_PROCESSOR_V1}:LogitsProcessor.validate_params": "cls, sampling_params",
}
"""What vLLM calls in the plugin, overridden or wrapped: all parameters, in order."""

BASES: dict[str, str] = {
    f"{_CPU}:CPUAttentionBackend": "AttentionBackend",
    f"{_CPU}:CPUAttentionMetadataBuilder": "AttentionMetadataBuilder",
    f"{_CPU}:CPUAttentionBackendImpl": "AttentionImpl",
    "vllm.platforms.cpu:CpuPlatform": "Platform",
    "vllm.exceptions:VLLMValidationError": "VLLMClientError",
}
"""Base classes, direct or not."""

VALUES: dict[str, str] = {
    # Writing into the cache is a call of its own, before `forward`.
    f"{_CPU}:CPUAttentionBackend.forward_includes_kv_cache_update": "False",
    f"{_TRITON}:TritonAttentionBackend.forward_includes_kv_cache_update": "False",
    f"{_FLASH}:FlashAttentionBackend.forward_includes_kv_cache_update": "False",
}
"""Class variables by the value that they are given."""

PASSAGES: dict[str, tuple[str, ...]] = {
    # Admission: an instance attribute holds the check, and parameters are copied after it ran.
    "vllm.v1.engine.input_processor:InputProcessor.__init__": (
        "self.validate_logits_processors_params =",
    ),
    "vllm.v1.engine.input_processor:InputProcessor._validate_params": (
        "self.validate_logits_processors_params(params)",
    ),
    "vllm.v1.engine.input_processor:InputProcessor.process_inputs": (
        "self._validate_params(",
        "params.clone()",
    ),
    # The hasher looks the function up in its own module, where it is replaced.
    "vllm.v1.core.kv_cache_utils:get_request_block_hasher": ("generate_block_hash_extra_keys(",),
    # The platform is asked by keyword.
    "vllm.v1.attention.selector:_cached_get_attn_backend": (
        "current_platform.get_attn_backend_cls(backend, "
        "attn_selector_config=attn_selector_config, num_heads=num_heads)",
    ),
    "vllm.model_executor.layers.attention.attention:unified_kv_cache_update": (
        "impl.do_kv_cache_update(attn_layer, key, value, kv_cache, layer_slot_mapping)",
    ),
    # Every layer has scales, which are those of its weights later on.
    "vllm.model_executor.layers.attention.attention:set_default_quant_scales": (
        "layer._k_scale_float = 1.0",
        "layer._v_scale_float = 1.0",
    ),
    "vllm.model_executor.layers.quantization.kv_cache:"
    "BaseKVCacheMethod.process_weights_after_loading": (
        "layer._k_scale_float = k_scale",
        "layer._v_scale_float = v_scale",
    ),
    # The CPU backend's layers know the instruction set of their caches.
    f"{_CPU}:CPUAttentionMetadataBuilder._set_isa_to_layers": ("layer.isa = self.isa",),
}
"""What functions do, as `ast.unparse` writes it, in this order."""
