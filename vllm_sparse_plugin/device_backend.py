"""The backend on CUDA: vLLM's dense backend on blocks with an index, and maskers in Triton."""

from __future__ import annotations

import logging
import weakref
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.kv_cache_interface import KVCacheLayout

from vllm_sparse_plugin import compat
from vllm_sparse_plugin.backend import SparseAttentionBackend, SparseAttentionImpl
from vllm_sparse_plugin.device_metadata import DeviceMetadataBuilder
from vllm_sparse_plugin.device_planners import planner_of, reserve_memory
from vllm_sparse_plugin.masked_attention import attend_row, attention_of
from vllm_sparse_plugin.paged.device.cache import DeviceCache, key_value_rows
from vllm_sparse_plugin.paged.device.step import DeviceGroup, DeviceStep
from vllm_sparse_plugin.paged.layout import BlockShape
from vllm_sparse_plugin.paged_cache import gather_row, read_token_major

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.platforms.interface import DeviceCapability
    from vllm.v1.kv_cache_interface import AttentionSpec

logger = logging.getLogger(__name__)


class DeviceAttentionBackend(SparseAttentionBackend):
    """See `SparseAttentionBackend`; blocks have an index behind the keys and values."""

    @staticmethod
    def get_impl_cls() -> type[DeviceAttentionImpl]:
        """The per-layer implementation."""
        return DeviceAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[DeviceMetadataBuilder]:
        """The per-step metadata builder."""
        return DeviceMetadataBuilder

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """A block's KV heads side by side: then each has its keys in one piece."""
        return (KVCacheLayout.LBHNC,)

    @classmethod
    def supports_compute_capability(cls, capability: DeviceCapability) -> bool:
        """Ampere and later: older GPUs have no bfloat16, and nothing was compiled for them."""
        return capability.major >= 8 and bool(super().supports_compute_capability(capability))

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """Makes room for the index in every block, in vLLM's own accounting."""
        if spec.state_content_bytes is not None:  # done before
            return spec
        vllm_config = compat.engine_being_built()
        layout = planner_of(vllm_config, compat.block_shape(spec, vllm_config)).layout
        return replace(spec, state_content_bytes=layout.bytes_per_token)


class DeviceAttentionImpl(SparseAttentionImpl):
    """One attention layer."""

    # Queries come as the model makes them, and outputs leave so: maskers know no scales.
    supports_quant_query_input = False

    def __init__(self, *arguments: Any, **named: Any) -> None:
        """See `SparseAttentionImpl`."""
        super().__init__(*arguments, **named)
        # Not the configuration itself, which refers to its layers.
        self._vllm_config = weakref.ref(compat.remember_engine_being_built())
        self._held: tuple[int, DeviceCache] | None = None

    def fused_output_quant_supported(self, quant_key: Any) -> bool:
        """False: see `supports_quant_query_input`."""
        return False

    def do_kv_cache_update(
        self,
        layer: Any,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Writes keys and values into their blocks, and the index with them."""
        self._cache(layer, kv_cache).write(key, value, slot_mapping)

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of one step; shapes as in vLLM's `AttentionImpl.forward`."""
        step = attn_metadata if isinstance(attn_metadata, DeviceStep) else None
        dense, rows = attn_metadata, kv_cache
        if attn_metadata is None:  # vLLM looks how much memory a step takes
            reserve_memory(self._engine())
        else:
            rows = key_value_rows(kv_cache, self.head_size)
        groups: tuple[DeviceGroup, ...] = ()
        if step is not None:
            layer_index = extract_layer_index(layer.layer_name)
            groups, dense = step.of_layer(layer_index, self.can_be_sparse)
        if dense is not None or attn_metadata is None:
            # Past the parent's own forward, which knows another kind of step.
            super(SparseAttentionImpl, self).forward(
                layer, query, key, value, rows, dense, output, output_scale, output_block_scale
            )
        for group in groups:
            assert step is not None
            self._attend_group(group, query, self._cache(layer, kv_cache), step, output)
        return output

    def _attend_group(
        self,
        group: DeviceGroup,
        query: torch.Tensor,
        cache: DeviceCache,
        step: DeviceStep,
        output: torch.Tensor,
    ) -> None:
        """Writes the output of the queries of one configuration."""
        attention = None
        if self.kv_sharing_target_layer_name is None:  # the index of another layer's keys is wrong
            planner = planner_of(self._engine(), cache.layout.shape)
            attention = planner.attention(group.config_json, cache.layer_index)
        if attention is None:
            self._attend_generally(group, query, cache, step, output)
            return
        taken = group.take(query)
        target = output[: len(taken)] if group.tokens is None else torch.empty_like(taken)
        attention.attend(
            taken,
            cache,
            group.batch,
            group.sizes[attention],
            self.scale,
            target.view(taken.shape),
            group.reads,
        )
        if group.tokens is not None:
            output[group.tokens] = target.view(-1, *output.shape[1:])

    def _attend_generally(
        self,
        group: DeviceGroup,
        query: torch.Tensor,
        cache: DeviceCache,
        step: DeviceStep,
        output: torch.Tensor,
    ) -> None:
        shape = cache.layout.shape
        for place, row in enumerate(group.rows):
            blocks = step.block_table[row.row]
            keys, values = gather_row(read_token_major, cache.rows(), blocks, row.seq_len)
            part = slice(row.query_start, row.query_end)
            result = attend_row(
                attention_of(group.config_json),
                query[part],
                keys,
                values,
                self.scale,
                cache.layer_index,
            )
            target = output[part]
            target.copy_(result.output.view_as(target))
            group.counts.add_general(place, result.read_keys, result.visible_keys, shape)

    def _engine(self) -> VllmConfig:
        config = self._vllm_config()
        assert config is not None  # it outlives its layers
        return config

    def _shape(self, kv_cache: torch.Tensor) -> BlockShape:
        return BlockShape(
            block_size=kv_cache.shape[2],
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_size=self.head_size,
            dtype=kv_cache.dtype,
        )

    def _cache(self, layer: Any, kv_cache: torch.Tensor) -> DeviceCache:
        """The layer's cache; made anew only when vLLM moves it."""
        if self._held is None or self._held[0] != kv_cache.data_ptr():
            planner = planner_of(self._engine(), self._shape(kv_cache))
            layer_index = extract_layer_index(layer.layer_name)
            cache = DeviceCache.of(kv_cache, planner.layout, layer_index, planner.space)
            self._held = (kv_cache.data_ptr(), cache)
        return self._held[1]
