"""The planners of the engines of this process."""

from __future__ import annotations

import logging
import weakref
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from vllm.model_executor.models.utils import extract_layer_index

from sparse_attention_hub.sparse_attention.research_attention import ResearchAttentionConfig
from vllm_sparse_plugin import compat
from vllm_sparse_plugin.paged.device.attention import device_maskers
from vllm_sparse_plugin.paged.device.planner import (
    STATES_BYTES,
    DevicePlanner,
    Limits,
    sequences_within,
)
from vllm_sparse_plugin.paged.layout import BlockLayout, BlockShape
from vllm_sparse_plugin.paged.served import indices_of

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger(__name__)

_PLANNERS: dict[int, dict[BlockShape, DevicePlanner]] = {}


def planner_of(engine: VllmConfig, shape: BlockShape) -> DevicePlanner:
    """The planner of an engine's layers with such a cache; it lives as long as the engine.

    Args:
        engine: See `compat.engine_of`.
        shape: Of the layers' caches.
    """
    key = id(engine)
    if key not in _PLANNERS:
        _PLANNERS[key] = {}
        weakref.finalize(engine, _PLANNERS.pop, key, None)
    planners = _PLANNERS[key]
    if shape not in planners:
        # vLLM enlarges blocks of layers with smaller caches than others, after it has looked how
        # much memory there is: they use what has been asked for until then.
        alike = (planner for other, planner in planners.items() if _is_alike(other, shape))
        planners[shape] = _planner(engine, shape, next(alike, None))
    return planners[shape]


def _is_alike(one: BlockShape, other: BlockShape) -> bool:
    return replace(one, block_size=other.block_size) == other


def _planner(engine: VllmConfig, shape: BlockShape, alike: DevicePlanner | None) -> DevicePlanner:
    config = compat.serving_config(engine)
    assert config is not None  # else the backend would not have been chosen
    # With speculation every request attends densely: neither index nor memory is of use.
    is_dense = engine.speculative_config is not None
    has_fast_path = config.fast_path and not is_dense
    indices = indices_of(config.indexed(), shape, device_maskers) if has_fast_path else []
    layout = BlockLayout(shape, tuple(indices))
    logger.info(
        "sparse attention: index of %d bytes per token and KV head beside %d of keys and values: "
        "%s",
        layout.index_bytes_per_token,
        shape.key_value_bytes,
        ", ".join(map(str, layout.indices)) or "none",
    )
    scheduler = engine.scheduler_config
    most = scheduler.max_num_seqs
    layers = compat.implementations(engine)
    # Not all have one: windows, and the recurrent layers of hybrid models.
    num_layers = sum(getattr(layer, "has_index", False) for layer in layers.values())
    shared = {
        name
        for name, layer in layers.items()
        if getattr(layer, "kv_sharing_target_layer_name", None)
    }
    limits = Limits(
        max_queries=most,
        capacity=-(-engine.model_config.max_model_len // 16) * 16,
        max_tokens=scheduler.max_num_batched_tokens,
        max_sequences=sequences_within(STATES_BYTES, most, layout, max(1, num_layers)),
        brings_maskers=config.allow_request_config and not is_dense,
        has_fast_path=has_fast_path,
    )
    own = ResearchAttentionConfig([]) if is_dense else config.attention
    device = torch.device(compat.device_type())
    return DevicePlanner(
        layout,
        limits,
        device,
        own,
        alike.memory if alike else None,
        frozenset(map(extract_layer_index, shared)),
    )
