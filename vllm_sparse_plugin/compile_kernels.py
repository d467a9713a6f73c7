"""Compiles, when a worker starts on CUDA, kernels that no graph and no measured step launches.

Triton compiles a kernel when it is first launched, some seconds for each, while all requests wait;
the results stay in the user's cache folder.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm
from vllm.config import VllmConfig
from vllm.model_executor.models.utils import extract_layer_index

from sparse_attention_hub.sparse_attention.research_attention import ResearchAttentionConfig
from sparse_attention_hub.sparse_attention.research_attention.maskers.fixed import (
    LocalMaskerConfig,
    SinkMaskerConfig,
)
from sparse_attention_hub.sparse_attention.serialization import config_to_json
from vllm_sparse_plugin import compat
from vllm_sparse_plugin.dummy_steps import LayerGroup, decode_batch, layers_of
from vllm_sparse_plugin.paged.served import configs_of_layer
from vllm_sparse_plugin.paged.warm_up import compiling
from vllm_sparse_plugin.row_table import row_table
from vllm_sparse_plugin.serving_config import ServingConfig

if TYPE_CHECKING:
    from vllm_sparse_plugin.device_metadata import DeviceMetadataBuilder

logger = logging.getLogger(__name__)

_NUM_KEYS = 40


def compile_kernels(vllm_config: VllmConfig) -> None:
    """Runs a layer once with each list of maskers that the server's configuration names.

    Its own maskers only where they would be compiled later: graphs and measured steps launch them
    too, but not what learns. Those of `index` as most requests bring them, behind a sink and a
    window.

    Args:
        vllm_config: Of the engine, whose caches are there and empty.
    """
    config, table = compat.serving_config(vllm_config), row_table(vllm_config)
    if config is None or not config.fast_path or table.graphs.is_always_dense:
        return
    has_graphs = vllm_config.compilation_config.cudagraph_mode.has_full_cudagraphs()
    with torch.inference_mode(), compiling():
        for builder in list(table.builders.values()):
            is_launched = builder.is_captured and (has_graphs or config.is_automatic)
            with_own = not is_launched or builder.learns
            lists = list(_lists(config, with_own))
            for own in tqdm(lists, desc="sparse attention: compiling kernels", disable=None):
                try:
                    _run_once(vllm_config, builder, config_to_json(own))
                except ValueError as error:  # a file that knows other layers than these
                    logger.warning("sparse attention: kernels of %s not compiled: %s", own, error)


def _lists(config: ServingConfig, with_own: bool) -> Iterator[ResearchAttentionConfig]:
    if with_own and not config.attention.is_dense:
        yield config.attention
    for masker in config.index.masker_configs:
        yield ResearchAttentionConfig([SinkMaskerConfig(1), LocalMaskerConfig(1), masker])


def _run_once(vllm_config: VllmConfig, builder: DeviceMetadataBuilder, config_json: str) -> None:
    layers = layers_of(vllm_config, builder)
    num_blocks, _, block_size, _ = layers[0].kv_cache.shape
    keys = min(_NUM_KEYS, vllm_config.model_config.max_model_len, (num_blocks - 1) * block_size)
    used = -(-keys // block_size)
    # Of layers with the same maskers, one: others launch the same kernels, but for learned sinks.
    different = {
        (
            repr(configs_of_layer(config_json, extract_layer_index(layer.layer_name))),
            layer.impl.sink_logits is None,
        ): layer
        for layer in reversed(layers)
    }
    group = LayerGroup.of(list(different.values()), 1, vllm_config.model_config.dtype)
    group.fill(used, vllm_config.scheduler_config.max_num_batched_tokens)
    try:
        step = builder.build_dummy(decode_batch(1, keys, keys, layers[0].kv_cache), config_json)
        if step is not None:
            group.attend(step, 1)
    finally:
        builder.forget_reads()
        group.empty(used)
