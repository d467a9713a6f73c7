"""The planners of the engines of this process."""

from __future__ import annotations

import logging
import weakref
from typing import TYPE_CHECKING

import torch

from vllm_sparse_plugin import compat
from vllm_sparse_plugin.paged.device.attention import device_maskers
from vllm_sparse_plugin.paged.device.planner import DevicePlanner, Limits
from vllm_sparse_plugin.paged.layout import BlockLayout, BlockShape
from vllm_sparse_plugin.paged.served import indices_of

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger(__name__)

_PLANNERS: dict[int, dict[BlockShape, DevicePlanner]] = {}


def planner_of(vllm_config: VllmConfig, shape: BlockShape) -> DevicePlanner:
    """The planner of an engine's layers with such a cache; it lives as long as the engine.

    Args:
        vllm_config: Of the engine.
        shape: Of the layers' caches.
    """
    key = id(vllm_config)
    if key not in _PLANNERS:
        _PLANNERS[key] = {}
        weakref.finalize(vllm_config, _PLANNERS.pop, key, None)
    planners = _PLANNERS[key]
    if shape not in planners:
        planners[shape] = _planner(vllm_config, shape)
    return planners[shape]


def reserve_memory(vllm_config: VllmConfig) -> None:
    """Asks for the memory of the engine's own maskers, while vLLM looks how much a step takes."""
    for planner in _PLANNERS.get(id(vllm_config), {}).values():
        planner.reserve()


def _planner(vllm_config: VllmConfig, shape: BlockShape) -> DevicePlanner:
    config = compat.serving_config(vllm_config)
    assert config is not None  # else the backend would not have been chosen
    indices = indices_of(config.indexed(), shape, device_maskers) if config.fast_path else []
    layout = BlockLayout(shape, tuple(indices))
    logger.info(
        "sparse attention: index of %d bytes per token and KV head beside %d of keys and values: "
        "%s",
        layout.index_bytes_per_token,
        shape.key_value_bytes,
        ", ".join(map(str, layout.indices)) or "none",
    )
    scheduler = vllm_config.scheduler_config
    limits = Limits(
        max_queries=scheduler.max_num_seqs,
        capacity=-(-vllm_config.model_config.max_model_len // 16) * 16,
        max_tokens=scheduler.max_num_batched_tokens,
    )
    device = torch.device(compat.device_type())
    return DevicePlanner(layout, limits, device, config.attention if config.fast_path else None)
