"""What of an engine's configuration the plugin refuses, and why."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vllm_sparse_plugin.compat.cache_types import EIGHT_BITS
from vllm_sparse_plugin.compat.engine import (
    DENSE_BACKEND,
    dense_backend,
    device_type,
    serving_config,
)

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def check_engine(vllm_config: VllmConfig, has_fast_path: bool = True) -> None:
    """Refuses, at start-up, what the plugin cannot serve correctly.

    Args:
        vllm_config: Of the engine.
        has_fast_path: See `ServingConfig.fast_path`.

    Raises:
        ValueError: Lists every reason.
    """
    parallel, model = vllm_config.parallel_config, vllm_config.model_config
    cache = vllm_config.cache_config
    has_eight_bits = cache.cache_dtype in EIGHT_BITS
    reasons = [
        reason
        for refused, reason in (
            (
                vllm_config.speculative_config is not None
                and (device_type() == "cpu" or not vllm_config.use_v2_model_runner),
                "speculative decoding on CPUs or with model runner V1: vLLM hands no per-request "
                "parameters to the worker then (with V2 on CUDA, requests attend densely)",
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
                # Kernels do not convert between 16-bit types: keys are stored as they come.
                not has_eight_bits
                and cache.cache_dtype not in ("auto", str(model.dtype).removeprefix("torch.")),
                f"--kv-cache-dtype {cache.cache_dtype} (allowed: auto, the model's own type, fp8)",
            ),
            (
                has_eight_bits and bool(cache.kv_cache_dtype_skip_layers),
                "--kv-cache-dtype-skip-layers: layers with caches of different types",
            ),
            (
                model.attention_chunk_size is not None,
                "chunked local attention: its batches are not the engine's",
            ),
            (
                cache.kv_sharing_fast_prefill,
                "--kv-sharing-fast-prefill: its batches are not the engine's",
            ),
            (
                model.enable_prompt_embeds,
                "prompt embeddings: the worker does not learn how long such a prompt is",
            ),
            (
                parallel.use_ubatching,
                "microbatches (--enable-dbo, --ubatch-size): two plans of one step",
            ),
            (parallel.decode_context_parallel_size > 1, "decode context parallelism"),
            (parallel.prefill_context_parallel_size > 1, "prefill context parallelism"),
        )
        if refused
    ]
    if has_eight_bits:
        reasons += objections_to_eight_bits(has_fast_path)
    _refuse(reasons)


def _refuse(reasons: list[str]) -> None:
    if reasons:
        raise ValueError(
            "--attention-backend CUSTOM (sparse attention) does not support: " + "; ".join(reasons)
        )


def check_cache(dtype: str, vllm_config: VllmConfig) -> None:
    """Refuses what a layer's cache is to hold, which its checkpoint may say, after `check_engine`.

    Args:
        dtype: As vLLM calls it.
        vllm_config: Of the engine whose layers are being made.

    Raises:
        ValueError: Lists every reason.
    """
    reasons = []
    if dtype in EIGHT_BITS:
        config = serving_config(vllm_config)
        reasons += objections_to_eight_bits(config is None or config.fast_path)
    elif vllm_config.cache_config.cache_dtype in EIGHT_BITS:
        reasons.append("layers with caches of different types")
    _refuse(reasons)


def objections_to_eight_bits(has_fast_path: bool) -> list[str]:
    """What is against caches of 8 bits on this platform.

    Args:
        has_fast_path: See `ServingConfig.fast_path`.
    """
    reasons = []
    if device_type() == "cuda" and dense_backend()[0].get_name() == "FLASH_ATTN":
        reasons.append(
            "--kv-cache-dtype fp8 beside FlashAttention, which wants queries of 8 bits "
            f"({DENSE_BACKEND}=TRITON_ATTN serves it)"
        )
    if device_type() == "cpu":
        if not has_fast_path:
            # Of vLLM's own cache, whose order there is not known.
            reasons.append('--kv-cache-dtype fp8 beside "fast_path": false on CPUs')
        if objection := _of_this_cpu():
            reasons.append(f"--kv-cache-dtype fp8 here: {objection}")
    return reasons


def _of_this_cpu() -> str:
    """What vLLM itself has against caches of 8 bits, whatever the layer; it says so later."""
    from vllm.v1.attention.backends import cpu_attn

    try:
        cpu_attn._get_attn_isa(torch.bfloat16, 32, 64, "fp8")
    except NotImplementedError as error:
        return str(error)
    return ""
