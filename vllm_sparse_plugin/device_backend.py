"""The backend on CUDA: vLLM's dense backend on blocks with an index, and maskers in Triton."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.kv_cache_interface import KVCacheLayout

from vllm_sparse_plugin import compat
from vllm_sparse_plugin.backend import SparseAttentionBackend, SparseAttentionImpl
from vllm_sparse_plugin.block_room import with_room
from vllm_sparse_plugin.device_metadata import DeviceMetadataBuilder
from vllm_sparse_plugin.device_planners import planner_of
from vllm_sparse_plugin.general_path import attend_generally
from vllm_sparse_plugin.paged.device.cache import DeviceCache
from vllm_sparse_plugin.paged.device.indices.base import DeviceIndex, device_index
from vllm_sparse_plugin.paged.device.step import DeviceGroup, DeviceStep
from vllm_sparse_plugin.paged.layout import (
    BlockIndex,
    BlockLayout,
    BlockShape,
    read_into,
    require_room,
)
from vllm_sparse_plugin.paged.triton_kernels.cache_rows import key_value_rows
from vllm_sparse_plugin.paged_cache import gather_row, read_token_major
from vllm_sparse_plugin.step_plan import DenseRow, SparseRow

if TYPE_CHECKING:
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
    def supports_batch_invariance(cls) -> bool:
        """False: another kernel reads a dense request's keys when a sparse one is in the batch."""
        return False

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """Makes room for the index in every block, in vLLM's own accounting."""
        if cls.is_laid_out(spec):
            return spec
        engine = compat.engine_being_built()
        return with_room(spec, engine, lambda shape: planner_of(engine, shape).layout)


class DeviceAttentionImpl(SparseAttentionImpl):
    """One attention layer."""

    # Queries come as the model makes them, and outputs leave so: maskers know no scales.
    supports_quant_query_input = False

    def __init__(self, *arguments: Any, **named: Any) -> None:
        """See `SparseAttentionImpl`."""
        super().__init__(*arguments, **named)
        # One of vLLM's sets it for each layer.
        self.supports_quant_query_input = False
        self._engine = compat.remember_engine_being_built()
        self._indices: tuple[BlockLayout, dict[BlockIndex, DeviceIndex]] | None = None
        # Of the cache that was seen last; not that itself, which vLLM frees to make another.
        self._seen: Callable[[], torch.Tensor | None] = lambda: None

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
            self._reserve(layer)
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
        planner = planner_of(self._engine, cache.layout.shape)
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
            group.sequences,
            group.whole,
            self.sink_logits,
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
        rows, table, scales = cache.rows(), step.block_table, cache.scales

        def read(row: DenseRow | SparseRow) -> tuple[torch.Tensor, torch.Tensor]:
            key, value = gather_row(read_token_major, rows, table[row.row], row.seq_len)
            if key.dtype.itemsize > 1:
                return key, value
            wide = [torch.empty_like(key, dtype=query.dtype) for _ in range(2)]
            return read_into(wide[0], key, scales.key), read_into(wide[1], value, scales.value)

        attend_generally(
            group.rows,
            read,
            group.config_json,
            query,
            self.scale,
            cache.layer_index,
            cache.layout.shape,
            output,
            group.counts,
            self.sink_logits,
        )

    def _reserve(self, layer: Any) -> None:
        """Asks for all memory that the layer takes besides its cache."""
        dtype = compat.element_type(layer.kv_cache_torch_dtype)
        shape = self._shape(self._engine.cache_config.block_size, dtype)
        _, indices = self._layout_and_indices(layer, shape)
        for index in indices.values():
            index.reserve()
        if self.can_be_sparse:
            planner_of(self._engine, shape).reserve(extract_layer_index(layer.layer_name))

    def _shape(self, block_size: int, dtype: torch.dtype) -> BlockShape:
        return BlockShape(block_size, self.num_heads, self.num_kv_heads, self.head_size, dtype)

    def _layout_and_indices(
        self, layer: Any, shape: BlockShape
    ) -> tuple[BlockLayout, dict[BlockIndex, DeviceIndex]]:
        if self._indices is None or self._indices[0].shape != shape:
            layout, indices = BlockLayout(shape), {}
            if self.can_be_sparse:
                planner = planner_of(self._engine, shape)
                layout, layer_index = planner.layout, extract_layer_index(layer.layer_name)
                for index in layout.indices:
                    if self.has_index or index.is_of_keys_alone:
                        indices[index] = device_index(index, layout, layer_index, planner.space)
            self._indices = (layout, indices)
        return self._indices

    def _cache(self, layer: Any, kv_cache: torch.Tensor) -> DeviceCache:
        """The layer's cache."""
        is_known = self._indices is not None and self._seen() is kv_cache
        if not is_known:
            self._seen = weakref.ref(kv_cache)
        scales = compat.cache_scales(layer, kv_cache.dtype)
        kv_cache = compat.typed_cache(kv_cache)
        if not is_known:
            shape = self._shape(kv_cache.shape[2], kv_cache.dtype)
            require_room(kv_cache, self._layout_and_indices(layer, shape)[0])
        assert self._indices is not None
        layout, indices = self._indices
        layer_index = extract_layer_index(layer.layer_name)
        return DeviceCache(kv_cache, layout, layer_index, indices, scales)
