"""What the CUDA path assumes about vLLM; see `vllm_symbols`."""

from __future__ import annotations

from tests.plugin.vllm_symbols import (
    BACKEND,
    BUILD_ARGUMENTS,
    BUILDER_ARGUMENTS,
    FORWARD_ARGUMENTS,
    IMPL,
    IMPL_ARGUMENTS,
    UPDATE_ARGUMENTS,
)

_FLASH = "vllm.v1.attention.backends.flash_attn"
_TRITON = "vllm.v1.attention.backends.triton_attn"
_PROCESSOR_V2 = "vllm.v1.worker.gpu.sample.logits_processor"
_GRAPHS = "vllm.v1.worker.gpu.cudagraph_utils"
_STATES = "vllm.v1.worker.gpu.model_states"

_METADATA = (
    "num_actual_tokens",
    "max_query_len",
    "query_start_loc",
    "max_seq_len",
    "seq_lens",
    "block_table",
    "slot_mapping",
    "causal",
)

NAMES: dict[str, tuple[str, ...]] = {
    _PROCESSOR_V2: ("LogitsProcessor",),
    _FLASH: (
        "FlashAttentionBackend",
        "FlashAttentionImpl",
        "FlashAttentionMetadata",
        "FlashAttentionMetadataBuilder",
    ),
    _TRITON: (
        "TritonAttentionBackend",
        "TritonAttentionImpl",
        "TritonAttentionMetadata",
        "TritonAttentionMetadataBuilder",
    ),
    "vllm.v1.attention.backends.fa_utils": (
        "flash_attn_varlen_func",
        "get_flash_attn_version",
        "is_flash_attn_varlen_func_available",
    ),
    "vllm.v1.attention.ops.triton_unified_attention": ("unified_attention",),
    "vllm.vllm_flash_attn": ("flash_attn_varlen_func",),
    "vllm.config.compilation": ("CUDAGraphMode",),
    "vllm.v1.cudagraph_dispatcher": ("CudagraphDispatcher",),
    _GRAPHS: ("BatchExecutionDescriptor", "CudaGraphManager", "ModelCudaGraphManager"),
    "vllm.distributed.parallel_state": ("get_tp_group",),
    "vllm.platforms.interface": ("DeviceCapability",),
    "vllm.v1.kv_cache_interface": ("AttentionSpec", "KVCacheLayout"),
    "vllm.v1.worker.gpu.model_runner": ("GPUModelRunner",),
    f"{_STATES}.mamba_hybrid": ("MambaHybridModelState", "build_attn_metadata"),
    "vllm.v1.worker.gpu_worker": ("Worker",),
}

MEMBERS: dict[str, tuple[str, ...]] = {
    f"{_PROCESSOR_V2}:LogitsProcRequestState": ("prompt_len",),
    "vllm.v1.worker.gpu.buffer_utils:UvaBackedTensor": ("np",),
    f"{_TRITON}:TritonAttentionMetadata": (
        *_METADATA,
        "seq_threshold_3D",
        "num_par_softmax_segments",
        "softmax_segm_output",
        "softmax_segm_max",
        "softmax_segm_expsum",
    ),
    f"{_TRITON}:TritonAttentionImpl": IMPL,
    f"{BACKEND}:AttentionCGSupport": ("UNIFORM_SINGLE_TOKEN_DECODE",),
    f"{BACKEND}:AttentionImpl": ("supports_quant_query_input",),
    "vllm.config:VllmConfig": ("scheduler_config", "use_v2_model_runner"),
    "vllm.config:SchedulerConfig": ("max_num_batched_tokens", "max_num_seqs"),
    "vllm.model_executor.layers.attention:Attention": (
        "kv_cache_torch_dtype",
        "kv_sharing_target_layer_name",
    ),
    "vllm.config:ParallelConfig": ("use_ubatching",),
    "vllm.v1.core.sched.output:SchedulerOutput": ("num_scheduled_tokens",),
    "vllm.platforms.interface:DeviceCapability": ("major",),
    "vllm.platforms.interface:Platform": ("device_name", "device_type"),
    "vllm.v1.kv_cache_interface:KVCacheLayout": ("LBHNC",),
    "vllm.v1.worker.gpu.input_batch:InputBatch": ("idx_mapping_np",),
    "vllm.v1.worker.gpu.states:RequestState": ("req_id_to_index",),
    f"{_FLASH}:FlashAttentionMetadataBuilder": ("scheduler_metadata",),
    f"{_FLASH}:FlashAttentionMetadata": (*_METADATA, "scheduler_metadata", "max_num_splits"),
    f"{_FLASH}:FlashAttentionImpl": IMPL,
    "vllm.config.compilation:CUDAGraphMode": ("FULL", "NONE", "PIECEWISE"),
    f"{_GRAPHS}:BatchExecutionDescriptor": ("cg_mode", "num_reqs", "num_tokens"),
    f"{_GRAPHS}:CudaGraphManager": (
        "_capture_descs",
        "_capture_mem_samples",
        "graphs",
        "vllm_config",
    ),
    "vllm.v1.cudagraph_dispatcher:CudagraphDispatcher": ("vllm_config",),
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner": (
        "req_states",
        "vllm_config",
    ),
}

CALLED: dict[str, str] = {
    "vllm.config.compilation:CUDAGraphMode.has_full_cudagraphs": "",
    "vllm.distributed.parallel_state:GroupCoordinator.broadcast_object": "obj, *, src",
    "vllm.distributed.parallel_state:get_tp_group": "",
    f"{_TRITON}:TritonAttentionImpl.__init__": IMPL_ARGUMENTS,
    f"{_FLASH}:FlashAttentionImpl.__init__": IMPL_ARGUMENTS,
    "vllm.v1.attention.ops.triton_unified_attention:unified_attention": (
        "*, q, k, v, out, cu_seqlens_q, max_seqlen_q, seqused_k, max_seqlen_k, softmax_scale, "
        "causal, window_size, block_table, softcap, q_descale, k_descale, v_descale, "
        "seq_threshold_3D, num_par_softmax_segments, softmax_segm_output, softmax_segm_max, "
        "softmax_segm_expsum"
    ),
    "vllm.vllm_flash_attn:flash_attn_varlen_func": (
        "*, q, k, v, out, cu_seqlens_q, max_seqlen_q, max_seqlen_k, seqused_k, softmax_scale, "
        "causal, window_size, block_table, scheduler_metadata, num_splits, return_softmax_lse, "
        "fa_version"
    ),
}

REPLACED: dict[str, str] = {
    f"{BACKEND}:AttentionBackend.supported_kv_cache_layouts": "cls",
    f"{BACKEND}:AttentionBackend.supports_batch_invariance": "cls",
    f"{BACKEND}:AttentionBackend.supports_compute_capability": "cls, capability",
    f"{BACKEND}:AttentionImpl.fused_output_quant_supported": "self, quant_key",
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner.gather_batch_req_state": (
        "self, scheduler_output, dummy_run"
    ),
    f"{_PROCESSOR_V2}:LogitsProcessor.__init__": "self, vllm_config, req_states",
    f"{_PROCESSOR_V2}:LogitsProcessor.add_request": "self, req_idx, sampling_params",
    f"{_PROCESSOR_V2}:LogitsProcessor.apply": "self, logits, ctx",
    f"{_PROCESSOR_V2}:LogitsProcessor.validate_params": "cls, sampling_params",
    f"{BACKEND}:AttentionMetadataBuilder.build_for_cudagraph_capture": (
        "self, common_attn_metadata"
    ),
    f"{BACKEND}:AttentionMetadataBuilder.get_cudagraph_support": (
        "cls, vllm_config, kv_cache_spec"
    ),
    f"{_TRITON}:TritonAttentionMetadataBuilder.__init__": BUILDER_ARGUMENTS,
    f"{_TRITON}:TritonAttentionMetadataBuilder.build": BUILD_ARGUMENTS,
    f"{_TRITON}:TritonAttentionMetadataBuilder.build_for_cudagraph_capture": (
        "self, common_attn_metadata"
    ),
    f"{_TRITON}:TritonAttentionBackend.customize_spec": "cls, spec",
    f"{_TRITON}:TritonAttentionImpl.forward": FORWARD_ARGUMENTS,
    f"{_TRITON}:TritonAttentionImpl.do_kv_cache_update": UPDATE_ARGUMENTS,
    f"{_FLASH}:FlashAttentionMetadataBuilder.__init__": BUILDER_ARGUMENTS,
    f"{_FLASH}:FlashAttentionMetadataBuilder.build": BUILD_ARGUMENTS,
    f"{_FLASH}:FlashAttentionMetadataBuilder.get_cudagraph_support": (
        "cls, vllm_config, kv_cache_spec"
    ),
    f"{_FLASH}:FlashAttentionImpl.forward": FORWARD_ARGUMENTS,
    f"{_FLASH}:FlashAttentionImpl.do_kv_cache_update": UPDATE_ARGUMENTS,
    "vllm.v1.cudagraph_dispatcher:CudagraphDispatcher.dispatch": (
        "self, num_tokens, uniform_decode, has_lora, num_active_loras, valid_modes, invalid_modes"
    ),
    f"{_GRAPHS}:CudaGraphManager.capture": "self, create_forward_fn, progress_bar_desc",
    f"{_GRAPHS}:ModelCudaGraphManager.capture": (
        "self, model, model_state, input_buffers, intermediate_tensors, block_tables, attn_groups, "
        "kv_cache_config, pcp_manager, has_lora, use_aux_hidden_state_outputs, lora_capture_hook, "
        "progress_bar_desc"
    ),
    f"{_GRAPHS}:ModelCudaGraphManager.run_fullgraph": "self, desc",
    "vllm.v1.worker.gpu_worker:Worker.sleep": "self, level",
    f"{_STATES}.mamba_hybrid:MambaHybridModelState.prepare_attn": (
        "self, input_batch, cudagraph_mode, block_tables, slot_mappings, attn_groups, "
        "kv_cache_config, for_capture, ubatch_idx, model_specific_attn_metadata"
    ),
}

BASES: dict[str, str] = {
    f"{_TRITON}:TritonAttentionBackend": "AttentionBackend",
    f"{_TRITON}:TritonAttentionMetadataBuilder": "AttentionMetadataBuilder",
    f"{_TRITON}:TritonAttentionImpl": "AttentionImpl",
    f"{_FLASH}:FlashAttentionBackend": "AttentionBackend",
    f"{_FLASH}:FlashAttentionMetadataBuilder": "AttentionMetadataBuilder",
    f"{_FLASH}:FlashAttentionImpl": "AttentionImpl",
    f"{_GRAPHS}:ModelCudaGraphManager": "CudaGraphManager",
    "vllm.v1.worker.gpu_worker:Worker": "WorkerBase",
}

PASSAGES: dict[str, tuple[str, ...]] = {
    # Runner V2 looks at the batch, chooses a graph, plans the step, and replays, in this order.
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner.execute_model": (
        "batch_req_state, uniform_tok_count = self.gather_batch_req_state(",
        "dispatch_cg_and_sync_dp(",
        "uniform_tok_count,",
        "self.model_state.prepare_attn(",
        "self.cudagraph_manager.run_fullgraph(batch_desc)",
    ),
    # Queries are quantized for whoever wants it when the layer is made.
    "vllm.model_executor.layers.attention.attention:Attention.__init__": (
        "self.impl = impl_cls(",
        "self.impl.supports_quant_query_input",
        "self.query_quant = QuantFP8(",
    ),
    # Queries of 16 bits can be multiplied with keys of 8.
    "vllm.v1.attention.ops.triton_unified_attention:_cast_kv_tile": (
        "return (data.to(tl.float32) * tl.load(tensor_scale)).to(Q.dtype)",
    ),
    # A batch of runner V2 that holds no request has the first slots.
    "vllm.v1.worker.gpu.input_batch:InputBatch.make_dummy": ("idx_mapping_np = np.arange(",),
    # Copies of a configuration share what layers register in.
    "vllm.config:VllmConfig.with_hf_config": ("return replace(self, model_config=model_config)",),
    # What is captured, where graphs are kept, and what is extrapolated from.
    f"{_GRAPHS}:CudaGraphManager.capture": (
        "self._capture_descs[mode]",
        "self._capture_mem_samples.append(",
        "self.graphs[desc] = graph",
    ),
    f"{_GRAPHS}:CudaGraphManager.run_fullgraph": ("self.graphs[desc].replay()",),
    # The profiling run has no metadata: memory that is asked for then is counted.
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner.profile_run": ("skip_attn=True",),
    # Workers make their caches before they capture graphs.
    "vllm.v1.engine.core:EngineCore._initialize_kv_caches": (
        "self.model_executor.initialize_from_config(",
        "self.model_executor.compile_or_warm_up_model()",
    ),
    # Schedules are kept in one place.
    f"{_FLASH}:FlashAttentionMetadataBuilder._store_scheduler_metadata": (
        "self.scheduler_metadata[:n] = scheduler_metadata",
    ),
    # Which requests a batch has: said, or for the hook of `compat.batch_hooks` to say.
    f"{_STATES}.default:DefaultModelState.prepare_attn": ("req_idx=input_batch.idx_mapping_np",),
    f"{_STATES}.mamba_hybrid:MambaHybridModelState.prepare_attn": (
        "attn_metadata = build_attn_metadata(",
    ),
    "vllm.v1.worker.gpu.sample.sampler:Sampler.add_request": (
        "processor.add_request(req_idx, sampling_params)",
    ),
}
