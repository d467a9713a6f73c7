"""The attention backend: vLLM's dense backend of the platform, with sparse rows taken out.

Dense rows go to the platform's own kernel, in one call and untouched when no row is sparse; but in
decode steps of CUDA graphs with maskers they are read with the sparse ones, see `device_metadata`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionCGSupport, AttentionType, CommonAttentionMetadata

from vllm_sparse_plugin import compat
from vllm_sparse_plugin.masked_attention import attend_row, attention_of
from vllm_sparse_plugin.named_layers import say_without_effect
from vllm_sparse_plugin.paged_cache import (
    BlockReader,
    cpu_block_reader,
    gather_row,
    read_token_major,
)
from vllm_sparse_plugin.row_table import Row, row_table
from vllm_sparse_plugin.step_plan import DenseRow, SparseRow, StepPlan, dense_part, split_rows

if TYPE_CHECKING:
    from vllm.config.cache import CacheDType
    from vllm.v1.kv_cache_interface import AttentionSpec

logger = logging.getLogger(__name__)

_DenseBackend, _DenseBuilder, _DenseImpl = compat.dense_backend()


class SparseAttentionBackend(_DenseBackend):  # type: ignore[misc, valid-type]
    """What the plugin can and cannot serve, in vLLM's terms.

    `is_sparse()` stays False: to vLLM, True means DeepSeek-style sparse models.
    """

    supported_kv_cache_dtypes: ClassVar[list[CacheDType]] = [*compat.SUPPORTED_CACHE_DTYPES]
    # From vLLM 0.33 on: no model may write the cache itself and call `forward` without keys.
    supports_kv_cache_update_bypass: ClassVar[bool] = False

    @staticmethod
    def get_name() -> str:
        """The name of the enum member under which the backend is registered."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[SparseAttentionImpl]:
        """The per-layer implementation."""
        return SparseAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[SparseAttentionMetadataBuilder]:
        """The per-step metadata builder."""
        return SparseAttentionMetadataBuilder

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        """Decoder self-attention only: maskers assume causal attention over one's own tokens."""
        return bool(attn_type == AttentionType.DECODER)

    @classmethod
    def supports_sink(cls) -> bool:
        """As the platform's dense kernel: that for CPUs has learned sinks, and does not say so."""
        return compat.device_type() == "cpu" or bool(super().supports_sink())

    @classmethod
    def supports_alibi_sqrt(cls) -> bool:
        """False: maskers know no position bias."""
        return False

    @classmethod
    def supports_mm_prefix(cls) -> bool:
        """False: maskers assume causal attention."""
        return False

    @classmethod
    def supports_non_causal(cls) -> bool:
        """False: maskers assume causal attention."""
        return False

    @classmethod
    def supports_rswa(cls) -> bool:
        """False: the prefix of that attention is not known to maskers."""
        return False

    @staticmethod
    def is_laid_out(spec: AttentionSpec) -> bool:
        """Whether `customize_spec` leaves a specification as it is.

        That is so where it was laid out before, and where vLLM asks for a block of one token: it
        then only wants to know how large a token is without what a block has besides, in order to
        choose the size of blocks next to others (of windows, of recurrent states).
        """
        return spec.state_content_bytes is not None or spec.block_size == 1

    @classmethod
    def supports_per_head_quant_scales(cls) -> bool:
        """False: a layer's keys have one scale."""
        return False

    @classmethod
    def supports_kv_connector(cls) -> bool:
        """False: a connector's keys may not tell sparse blocks from dense ones."""
        return False


class SparseAttentionMetadataBuilder(_DenseBuilder):  # type: ignore[misc, valid-type]
    """Plans each step, once for all layers of a KV cache group."""

    # The general path runs on the host's side of each step: no CUDA graph can hold it.
    _cudagraph_support = AttentionCGSupport.NEVER
    supports_update_block_table = False

    def __init_subclass__(cls, **arguments: Any) -> None:
        """Refuses what vLLM derives to show layers of other kinds another step than there is.

        A step that is not causal, or that begins with keys of no token.

        Raises:
            ValueError: The class is not the plugin's own.
        """
        super().__init_subclass__(**arguments)
        if not cls.__module__.startswith(f"{__package__}."):
            raise ValueError(
                "--attention-backend CUSTOM (sparse attention) cannot serve this model: some of "
                f"its layers want a {cls.__name__}"
            )

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        """Joins the engine's row table, and looks which layers can be sparse."""
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        # A worker may get its configuration without an API server in front of it.
        self._config = compat.serving_config(vllm_config)
        self._table = row_table(vllm_config)
        layers = get_layers_from_vllm_config(vllm_config, Attention, layer_names)
        dense_only = [name for name, layer in layers.items() if not layer.impl.can_be_sparse]
        if dense_only:
            logger.warning(
                "sparse attention: %d layers have a sliding window and stay dense: %s",
                len(dense_only),
                ", ".join(dense_only),
            )
        self._has_dense_layers = bool(dense_only)
        self._sparse_layers = [name for name in layers if name not in dense_only]
        self._has_sparse_layers = bool(self._sparse_layers)
        self._name = layer_names[0]
        if self._has_sparse_layers and self._table.counter is None:
            self._table.counter = self._name
            if self._config is not None:
                every = get_layers_from_vllm_config(vllm_config, Attention)
                say_without_effect(self._config.attention, every)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> Any:
        """The dense backend's metadata; with a `StepPlan` on it when a query is sparse."""

        def build_dense(common: CommonAttentionMetadata) -> Any:
            return super(SparseAttentionMetadataBuilder, self).build(
                common_prefix_len, common, fast_build
            )

        rows = self._rows_of_batch(common_attn_metadata)
        if not rows or not self._has_sparse_layers:
            return build_dense(common_attn_metadata)
        dense, sparse = split_rows(
            common_attn_metadata.query_start_loc_cpu.tolist(),
            self._host_seq_lens(common_attn_metadata),
            rows,
        )
        self._count_queries(rows, dense, sparse)
        if not sparse:
            return build_dense(common_attn_metadata)
        tokens = torch.empty(0, dtype=torch.long)
        metadata = None
        if dense:
            part, tokens = dense_part(common_attn_metadata, dense)
            metadata = build_dense(part)
        # Layers with a sliding window read the whole step's metadata; others read the plan.
        whole = metadata
        if whole is None or self._has_dense_layers:
            whole = build_dense(common_attn_metadata)
        whole.sparse_plan = StepPlan(
            sparse_rows=tuple(sparse),
            block_table=common_attn_metadata.block_table_tensor,
            dense_tokens=tokens,
            dense_metadata=metadata,
        )
        return whole

    def _rows_of_batch(self, common: CommonAttentionMetadata) -> dict[int, Row]:
        """The engine's special rows by position in this batch.

        Raises:
            RuntimeError: Nobody says which requests these are.
        """
        rows = self._table.rows
        if common.req_idx is not None:
            slots = common.req_idx.tolist()
            return {row: rows[slot] for row, slot in enumerate(slots) if slot in rows}
        if not self._table.has_slots:
            return rows
        if self._table.graphs.is_always_dense:  # the steps of a draft
            return {}
        # A guess would be some other request's parameters.
        raise RuntimeError(
            "sparse attention: vLLM's model runner V2 does not say which requests are in this "
            "batch; VLLM_USE_V2_MODEL_RUNNER=0 serves this model"
        )

    @staticmethod
    def _host_seq_lens(common: CommonAttentionMetadata) -> list[int]:
        """Sequence lengths without a device sync (the bound is exact without speculation)."""
        bound = common.seq_lens_cpu_upper_bound
        lengths: list[int] = (common.seq_lens if bound is None else bound).tolist()
        return lengths[: common.num_reqs]

    def _count_queries(
        self, rows: Mapping[int, Row], dense: list[DenseRow], sparse: list[SparseRow]
    ) -> None:
        if self._table.counter != self._name:
            return
        for part in dense:
            row = rows.get(part.row)
            if row is not None:
                count = part.query_end - part.query_start
                automatic = 0
                if row.parameters.config_json is not None:
                    # Positions [seq_len - count, seq_len), of them those past the asked prefix.
                    automatic = min(count, max(0, part.seq_len - row.asked_prefix_tokens))
                self._table.statistics.add_queries(
                    row.parameters.tag, sparse=0, dense=count, automatic=automatic
                )
        for piece in sparse:
            count = piece.query_end - piece.query_start
            self._table.statistics.add_queries(piece.parameters.tag, sparse=count, dense=0)


class SparseAttentionImpl(_DenseImpl):  # type: ignore[misc, valid-type]
    """One attention layer."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None,
        sliding_window: int | None,
        kv_cache_dtype: str,
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        **extra: Any,
    ) -> None:
        """Refuses what maskers would get wrong.

        Raises:
            ValueError: The layer has ALiBi slopes, a logits soft cap, or a cache of a type that
                cannot be read here.
        """
        if alibi_slopes is not None:
            raise ValueError("--attention-backend CUSTOM (sparse attention): ALiBi not supported")
        if logits_soft_cap:
            raise ValueError(
                "--attention-backend CUSTOM (sparse attention): logits soft cap not supported"
            )
        vllm_config = compat.current_vllm_config()
        compat.check_cache(kv_cache_dtype, vllm_config)
        super().__init__(
            num_heads,
            head_size,
            scale,
            num_kv_heads,
            alibi_slopes,
            sliding_window,
            kv_cache_dtype,
            logits_soft_cap,
            attn_type,
            kv_sharing_target_layer_name,
            **extra,
        )
        self.can_be_sparse = not compat.window_restricts(sliding_window, vllm_config)
        self._statistics = row_table(vllm_config).statistics

    @property
    def sink_logits(self) -> torch.Tensor | None:
        """Of learned attention sinks, `[num_heads]`, which vLLM hands to some models' layers."""
        logits: torch.Tensor | None = self.sinks
        return logits

    @property
    def has_index(self) -> bool:
        """Whether the layer's blocks hold an index that is kept right.

        Nobody reads that of a layer which stays dense; shared keys have one already.
        """
        return self.can_be_sparse and self.kv_sharing_target_layer_name is None

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
        plan: StepPlan | None = getattr(attn_metadata, "sparse_plan", None)
        if plan is None or not self.can_be_sparse:
            dense: torch.Tensor = super().forward(
                layer,
                query,
                key,
                value,
                kv_cache,
                attn_metadata,
                output,
                output_scale,
                output_block_scale,
            )
            return dense
        if plan.dense_metadata is not None:
            tokens = plan.dense_tokens
            part = torch.empty_like(output[: len(tokens)])
            super().forward(
                layer,
                query[tokens],
                key[tokens],
                value[tokens],
                kv_cache,
                plan.dense_metadata,
                part,
            )
            output[tokens] = part
        read = self._block_reader(layer, kv_cache)
        layer_index = extract_layer_index(layer.layer_name)
        for row in plan.sparse_rows:
            self._attend(row, plan, read, layer_index, query, kv_cache, output)
        return output

    def _attend(
        self,
        row: SparseRow,
        plan: StepPlan,
        read: BlockReader,
        layer_index: int,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        output: torch.Tensor,
    ) -> None:
        """Writes the output of one row's sparse queries, and counts what they read."""
        assert row.parameters.config_json is not None
        keys, values = gather_row(read, kv_cache, plan.block_table[row.row], row.seq_len)
        result = attend_row(
            attention_of(row.parameters.config_json),
            query[row.query_start : row.query_end],
            keys,
            values,
            self.scale,
            layer_index,
            self.sink_logits,
        )
        target = output[row.query_start : row.query_end]
        target.copy_(result.output.view_as(target))
        self._statistics.add_keys(row.parameters.tag, result.read_keys, result.visible_keys)

    def _block_reader(self, layer: Any, kv_cache: torch.Tensor) -> BlockReader:
        if kv_cache.device.type != "cpu":
            return read_token_major
        return cpu_block_reader(kv_cache.shape[2], self.head_size, kv_cache.dtype, layer.isa)
