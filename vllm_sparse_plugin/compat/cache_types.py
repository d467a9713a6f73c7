"""What vLLM's caches hold, and with which scales."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from vllm_sparse_plugin.paged.cache_scales import UNSCALED, CacheScales

if TYPE_CHECKING:
    from vllm.config import VllmConfig

EIGHT_BITS = ("fp8", "fp8_e4m3")
"""vLLM's names of the one type with which it makes caches of bytes that the plugin reads."""
SUPPORTED_CACHE_DTYPES = ("auto", "float16", "bfloat16", *EIGHT_BITS)


def element_type(dtype: torch.dtype) -> torch.dtype:
    """What a cache holds that vLLM makes with a type: bytes are E4M3, see `EIGHT_BITS`."""
    return torch.float8_e4m3fn if dtype == torch.uint8 else dtype


def typed_cache(kv_cache: torch.Tensor) -> torch.Tensor:
    """A layer's cache as what it holds, see `element_type`; itself, where that is its type."""
    if kv_cache.dtype != torch.uint8:
        return kv_cache
    return kv_cache.view(element_type(kv_cache.dtype))


def cache_dtype(vllm_config: VllmConfig) -> torch.dtype:
    """What the caches of this engine hold."""
    if vllm_config.cache_config.cache_dtype in EIGHT_BITS:
        return torch.float8_e4m3fn
    dtype: torch.dtype = vllm_config.model_config.dtype
    return dtype


def cache_scales(layer: Any, dtype: torch.dtype) -> CacheScales:
    """What a layer's keys and values are divided by in its cache: a model may say it.

    Args:
        layer: Of vLLM, whose weights are loaded.
        dtype: With which vLLM makes the cache.
    """
    if dtype.itemsize > 1:
        return UNSCALED
    return CacheScales(layer._k_scale_float, layer._v_scale_float)
