"""The backend on CPUs: it owns the blocks, and its maskers run on them (`paged`)."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_sparse_plugin import compat
from vllm_sparse_plugin.backend import (
    SparseAttentionBackend,
    SparseAttentionImpl,
    SparseAttentionMetadataBuilder,
)
from vllm_sparse_plugin.block_room import with_room
from vllm_sparse_plugin.general_path import attend_generally
from vllm_sparse_plugin.paged import threads
from vllm_sparse_plugin.paged.attention import NO_SINKS, attend_dense
from vllm_sparse_plugin.paged.huge_pages import prefer_huge_pages
from vllm_sparse_plugin.paged.layout import BlockLayout, BlockShape, LayerCache
from vllm_sparse_plugin.paged.prefill import attend_prefills, stored_rows
from vllm_sparse_plugin.paged.served import indices_of, is_dense_layer, paged_attention_of
from vllm_sparse_plugin.paged.step import PagedStep, QueryGroup, SparseGroup, paged_step
from vllm_sparse_plugin.paged.warm_up import warm_up
from vllm_sparse_plugin.serving_config import ServingConfig
from vllm_sparse_plugin.step_plan import DenseRow, SparseRow, split_rows

if TYPE_CHECKING:
    from vllm.v1.kv_cache_interface import AttentionSpec

logger = logging.getLogger(__name__)


@functools.lru_cache(maxsize=64)
def block_layout(config: ServingConfig, shape: BlockShape) -> BlockLayout:
    """The blocks of a server: keys, values, and what its maskers need besides."""
    layout = BlockLayout(shape, tuple(indices_of(config.indexed(), shape)))
    extra, own = layout.index_bytes_per_token, shape.key_value_bytes
    logger.info(
        "sparse attention: index of %d bytes per token and KV head beside %d of keys and values "
        "(%.1f %%): %s",
        extra,
        own,
        100 * extra / own,
        ", ".join(map(str, layout.indices)) or "none",
    )
    return layout


class PagedAttentionBackend(SparseAttentionBackend):
    """See `SparseAttentionBackend`; the blocks are the plugin's own."""

    @staticmethod
    def get_impl_cls() -> type[PagedAttentionImpl]:
        """The per-layer implementation."""
        return PagedAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[PagedMetadataBuilder]:
        """The per-step metadata builder."""
        return PagedMetadataBuilder

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """Makes room for the index in every block, in vLLM's own accounting."""
        if cls.is_laid_out(spec):
            return spec
        engine = compat.engine_being_built()
        config = compat.serving_config(engine)
        assert config is not None  # else this backend would not have been chosen
        return with_room(spec, engine, functools.partial(block_layout, config))


def check_shared_caches(layers: Mapping[str, Any]) -> None:
    """Looks whether layers that share a cache store keys in the same order.

    Those with a window are vLLM's, which puts them in an order of its own on CPUs.

    Args:
        layers: Of a KV cache group, by name.

    Raises:
        ValueError: One of two has a window.
    """
    for name, layer in layers.items():
        target = layers.get(layer.kv_sharing_target_layer_name)
        if target is not None and target.impl.can_be_sparse != layer.impl.can_be_sparse:
            raise ValueError(
                "--attention-backend CUSTOM (sparse attention): on CPUs, layers with a window and "
                f"without one cannot share keys, as {name} does with "
                f"{layer.kv_sharing_target_layer_name}"
            )


class PagedMetadataBuilder(SparseAttentionMetadataBuilder):
    """Plans each step, once for all layers of a KV cache group."""

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        """Starts the kernels' threads, and compiles the kernels."""
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        check_shared_caches(get_layers_from_vllm_config(vllm_config, Attention, layer_names))
        threads.start(torch.get_num_threads())
        config = self._config
        assert config is not None  # else this backend would not have been chosen
        if not self._has_sparse_layers:
            compat.check_blocks(kv_cache_spec, None)
            return
        layout = block_layout(config, compat.block_shape(kv_cache_spec, vllm_config))
        compat.check_blocks(kv_cache_spec, layout)
        warm_up(config.indexed(), layout)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> Any:
        """A `PagedStep`; vLLM's own metadata when no layer can be sparse."""
        whole = None
        if self._has_dense_layers:
            # Past the parent's own build: layers with a sliding window want vLLM's metadata.
            whole = super(SparseAttentionMetadataBuilder, self).build(
                common_prefix_len, common_attn_metadata, fast_build
            )
        # Its own former step alone: another group's layers have not run yet in this one.
        self._table.statistics.settle(id(self))
        if not self._has_sparse_layers:
            return whole
        rows = self._rows_of_batch(common_attn_metadata)
        dense, sparse = split_rows(
            common_attn_metadata.query_start_loc_cpu.tolist(),
            self._host_seq_lens(common_attn_metadata),
            rows,
        )
        self._count_queries(rows, dense, sparse)
        step = paged_step(dense, sparse, common_attn_metadata.block_table_tensor, whole)
        self._table.statistics.pending[id(self)] = [group.counts for group in step.sparse]
        return step


class PagedAttentionImpl(SparseAttentionImpl):
    """One attention layer on the plugin's own blocks."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        """See `SparseAttentionImpl`."""
        super().__init__(*arguments, **named)
        config = compat.serving_config(compat.remember_engine_being_built())
        assert config is not None  # else this backend would not have been chosen
        self._config = config
        self._views: tuple[int, LayerCache] | None = None

    def prepare_cache(self, layer: Any) -> None:
        """Puts the layer's cache into large memory pages, which takes a while, at start-up."""
        if self.can_be_sparse and layer.kv_cache.numel():
            self._cache(layer, layer.kv_cache)

    def do_kv_cache_update(
        self,
        layer: Any,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Writes keys and values into their blocks, and the index with them."""
        if not self.can_be_sparse:
            super().do_kv_cache_update(
                layer, key, value, _without_index(kv_cache, self.head_size), slot_mapping
            )
            return
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
        if attn_metadata is None:  # a profiling run
            return output
        if not self.can_be_sparse:
            whole = attn_metadata.whole if isinstance(attn_metadata, PagedStep) else attn_metadata
            narrow = _without_index(kv_cache, self.head_size)
            result: torch.Tensor = super().forward(
                layer, query, key, value, narrow, whole, output, output_scale, output_block_scale
            )
            return result
        step: PagedStep = attn_metadata
        cache = self._cache(layer, kv_cache)
        written = None if self.kv_sharing_target_layer_name else (key, value)
        tensors = (layer, query, written, cache, step, output)
        self._attend_densely(step.decodes, step.prefills, *tensors)
        for group in step.sparse:
            self._attend_group(group, *tensors)
        return output

    def _attend_densely(
        self,
        decodes: QueryGroup | None,
        prefills: Sequence[DenseRow | SparseRow],
        layer: Any,
        query: torch.Tensor,
        written: tuple[torch.Tensor, torch.Tensor] | None,
        cache: LayerCache,
        step: PagedStep,
        output: torch.Tensor,
    ) -> None:
        """Writes the output of queries that read every key that they see."""
        if prefills:
            attend_prefills(
                prefills,
                query,
                written,
                cache,
                step.block_table,
                self.scale,
                layer.isa,
                output,
                self.sink_logits,
            )
        if decodes is not None:
            taken = decodes.take(query)
            result = decodes.target(taken, output)
            attend_dense(taken, cache, decodes.batch, self.scale, result, self._sinks())
            decodes.put(result, output)

    def _attend_group(
        self,
        group: SparseGroup,
        layer: Any,
        query: torch.Tensor,
        written: tuple[torch.Tensor, torch.Tensor] | None,
        cache: LayerCache,
        step: PagedStep,
        output: torch.Tensor,
    ) -> None:
        """Writes the output of the queries of one configuration, and counts what they read."""
        queries, counts = group.queries, group.counts
        if is_dense_layer(group.config_json, cache.layer_index):
            self._attend_densely(
                group.decodes, group.prefills, layer, query, written, cache, step, output
            )
            counts.add_dense(cache.layout.shape)
            return
        is_shared = self.kv_sharing_target_layer_name is not None
        fast = paged_attention_of(group.config_json, cache.layout, cache.layer_index, is_shared)
        if fast is not None:
            taken = queries.take(query)
            result = queries.target(taken, output)
            sinks = self._sinks()
            _, read = fast.attend(taken, cache, queries.batch, self.scale, result, sinks)
            queries.put(result, output)
            counts.add(read, cache.layout.shape)
            return
        self._attend_generally(group, query, cache, step, output)

    def _attend_generally(
        self,
        group: SparseGroup,
        query: torch.Tensor,
        cache: LayerCache,
        step: PagedStep,
        output: torch.Tensor,
    ) -> None:
        shape = cache.layout.shape

        def read(row: DenseRow | SparseRow) -> tuple[torch.Tensor, torch.Tensor]:
            blocks = step.block_table[row.row]
            key, value = stored_rows(cache, blocks, row.seq_len, 0, shape.num_kv_heads, query.dtype)
            return key.transpose(0, 1)[None], value.transpose(0, 1)[None]

        attend_generally(
            group.queries.rows,
            read,
            group.config_json,
            query,
            self.scale,
            cache.layer_index,
            shape,
            output,
            group.counts,
            self.sink_logits,
        )

    def _sinks(self) -> np.ndarray:
        """The logits of learned attention sinks, for kernels."""
        logits = self.sink_logits
        return NO_SINKS if logits is None else logits.detach().float().numpy()

    def _cache(self, layer: Any, kv_cache: torch.Tensor) -> LayerCache:
        """The layer's cache as kernels see it; made anew only where vLLM has moved it."""
        scales = compat.cache_scales(layer, kv_cache.dtype)
        if (
            self._views is None
            or self._views[0] != kv_cache.data_ptr()
            or self._views[1].scales != scales
        ):
            kv_cache = compat.typed_cache(kv_cache)
            shape = BlockShape(
                block_size=kv_cache.shape[2],
                num_heads=self.num_heads,
                num_kv_heads=self.num_kv_heads,
                head_size=self.head_size,
                dtype=kv_cache.dtype,
            )
            layout, layer_index = (
                block_layout(self._config, shape),
                extract_layer_index(layer.layer_name),
            )
            cache = LayerCache.of(kv_cache, layout, layer_index, scales)
            self._views = (kv_cache.data_ptr(), cache)
            prefer_huge_pages(kv_cache)
        return self._views[1]


def _without_index(kv_cache: torch.Tensor, head_size: int) -> torch.Tensor:
    """The part of each block that vLLM's own kernels know, as a view."""
    num_blocks, num_kv_heads, block_size, _ = kv_cache.shape
    width = 2 * head_size
    strides = (kv_cache.stride(0), block_size * width, width, 1)
    return kv_cache.as_strided((num_blocks, num_kv_heads, block_size, 2 * head_size), strides)
