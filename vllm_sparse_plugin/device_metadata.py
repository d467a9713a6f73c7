"""The plan of each step on CUDA, made on the host while the device still works on the last one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata

from sparse_attention_hub.sparse_attention.serialization import config_to_json
from vllm_sparse_plugin import compat
from vllm_sparse_plugin.automatic_rows import settle_automatic
from vllm_sparse_plugin.backend import SparseAttentionMetadataBuilder
from vllm_sparse_plugin.device_planners import planner_of
from vllm_sparse_plugin.paged.device.mixed_step import launches_of, mixed_group
from vllm_sparse_plugin.paged.device.planner import LayerUse
from vllm_sparse_plugin.paged.device.read_counts import CountedGroup, StepCounter
from vllm_sparse_plugin.paged.device.sequences import SequenceStates, StepSequences
from vllm_sparse_plugin.paged.device.step import (
    DeviceGroup,
    DeviceStep,
    StepTable,
    dense_lengths,
    upload,
)
from vllm_sparse_plugin.paged.group_counts import GroupCounts
from vllm_sparse_plugin.paged.learned_index import LearnedIndex
from vllm_sparse_plugin.paged.triton_kernels.cache_rows import DeviceBatch
from vllm_sparse_plugin.request_parameters import RequestParameters
from vllm_sparse_plugin.row_table import Row
from vllm_sparse_plugin.step_plan import DenseRow, SparseRow, split_rows

if TYPE_CHECKING:
    from vllm.v1.kv_cache_interface import AttentionSpec


class DeviceMetadataBuilder(SparseAttentionMetadataBuilder):
    """Plans each step, once for all layers of a KV cache group.

    In a decode step, the launch that reads what is selected for some queries reads all keys for
    dense ones: so a CUDA graph holds both in any mixture. (The dense backend's kernel takes some
    20 us in each layer to find that no query is dense, measured on an H200.) In other steps, the
    dense backend's metadata are those of all rows; where one has no dense query, they let it see
    next to nothing, and its output is overwritten. So nothing is gathered.

    Attributes:
        is_captured: Whether graphs hold the engine's own maskers, if there are graphs.
        learns: Whether those maskers learn something of a request's first keys.
    """

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        """Asks for the memory that CUDA graphs know."""
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        assert self._config is not None  # else this backend would not have been chosen
        engine = compat.engine_of(vllm_config)
        self._planner = planner_of(engine, compat.block_shape(kv_cache_spec, engine))
        compat.check_blocks(
            kv_cache_spec, self._planner.layout if self._has_sparse_layers else None
        )
        self._layers = tuple(extract_layer_index(name) for name in self._sparse_layers)
        self._is_speculative = vllm_config.speculative_config is not None
        compilation = vllm_config.compilation_config
        self._has_graphs = compilation.cudagraph_mode.has_full_cudagraphs()
        self._most_replayed = compilation.max_cudagraph_capture_size or 0
        limits, own = self._planner.limits, config_to_json(self._config.attention)
        use = self._planner.use(own, self._layers)
        # What graphs hold: the engine's own maskers, if all layers take the fast path.
        is_captured = use.fast_layers > 0 and use.general_layers == 0
        is_captured &= not self._is_speculative
        self._captured: str | None = own if is_captured else None
        self.is_captured, self.learns = is_captured, use.learns
        # What all maskers together have learned of each request, if any of them learns.
        self._sequences: SequenceStates | None = None
        if any(isinstance(index, LearnedIndex) for index in self._planner.layout.indices):
            self._sequences = SequenceStates(limits.max_sequences)
        # The same, if those in graphs do.
        self._captured_sequences = self._sequences if is_captured and use.learns else None
        self._step_table = StepTable(
            use.attentions if is_captured else (), limits.max_queries, device
        )
        self._reads = StepCounter.of(
            max(limits.max_queries, limits.max_tokens),
            self._planner.layout.shape,
            self._table.statistics,
            device,
        )
        self._second_schedule: torch.Tensor | None = None
        graphs = self._table.graphs
        graphs.is_always_dense = self._is_speculative
        if use.fast_layers or use.general_layers:
            # Not where all layers stay dense in this configuration: their graphs serve it as well.
            graphs.captured[self._name] = self._captured
            if self._captured_sequences is not None:
                graphs.sequences[self._name] = self._captured_sequences
        if self._has_sparse_layers:
            self._table.builders[self._name] = self

    @property
    def sparse_layers(self) -> tuple[str, ...]:
        """Names of the layers that have no window."""
        return tuple(self._sparse_layers)

    @classmethod
    def get_cudagraph_support(
        cls, vllm_config: VllmConfig, kv_cache_spec: AttentionSpec
    ) -> AttentionCGSupport:
        """Decode steps of one query per request; with speculation, what the dense backend can.

        Steps with maskers that are not captured run without: see `fits_graphs`.
        """
        _, dense_builder, _ = compat.dense_backend()
        support = dense_builder.get_cudagraph_support(vllm_config, kv_cache_spec)
        if vllm_config.speculative_config is not None:
            return support
        return min(
            support, AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE, key=lambda level: level.value
        )

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> Any:
        """A `DeviceStep`; for a step without sparse queries, the dense backend's metadata.

        With runner V1, whose graphs all hold maskers, decode steps are a `DeviceStep` in any case.
        """
        common, graphs = common_attn_metadata, self._table.graphs
        rows = {} if graphs.is_dummy else self._rows_of_batch(common)
        starts: list[int] = common.query_start_loc_cpu.tolist()
        seq_lens = self._host_seq_lens(common)
        dense, sparse = self._settle(common, *split_rows(starts, seq_lens, rows))
        if self._is_speculative:
            self._count_fallback(sparse)
            sparse = []
        self._count_queries(rows, dense, sparse)
        if not self._has_sparse_layers:
            return self._build_dense(common, fast_build)
        self._reads.collect()
        if self._name in graphs.captured:  # others have no masker in any graph
            graphs.step_is_sparse = bool(sparse)
        if self._sequences is not None and not graphs.is_dummy:
            present = [(rows[row], seq_lens[row]) for row in rows if row < len(seq_lens)]
            self._sequences.see(present)
        fits = (
            self._captured is not None
            and common.max_query_len <= 1
            and all(row.parameters.config_json == self._captured for row in sparse)
            and all(row.query_start == row.row for row in dense)
            and all(row.query_start == row.row for row in sparse)
            and self._need_their_last_codes(sparse, rows)
        )
        if fits and (sparse or (self._has_graphs and not graphs.has_dense_graphs)):
            whole, lengths = np.zeros((2, common.num_reqs), np.int32)
            whole[[row.row for row in dense]] = [row.seq_len for row in dense]
            lengths[[row.row for row in sparse]] = [row.seq_len for row in sparse]
            places = self._places(common.num_reqs, sparse, rows)
            return self._decode_step(common, whole, lengths, places, sparse, fast_build)
        if not sparse:
            return self._build_dense(common, fast_build)
        return self._mixed_step(
            common, dense_lengths(starts, seq_lens, dense), bool(dense), sparse, rows, fast_build
        )

    def build_for_cudagraph_capture(self, common_attn_metadata: CommonAttentionMetadata) -> Any:
        """A decode step in which every request is padding, with all the launches of any other."""
        if (
            self._captured is None
            or not self._has_sparse_layers
            or not self._table.graphs.captures_sparse
        ):
            # Past the parent, to the dense backend, which may come back to `build`.
            return super(SparseAttentionMetadataBuilder, self).build_for_cudagraph_capture(
                common_attn_metadata
            )
        self._table.graphs.step_is_sparse = True
        zeros = np.zeros(common_attn_metadata.num_reqs, np.int32)
        return self._decode_step(common_attn_metadata, zeros, zeros, zeros, [], fast_build=False)

    def _need_their_last_codes(self, sparse: Sequence[SparseRow], rows: Mapping[int, Row]) -> bool:
        """Whether nothing is to be learned, or to be encoded but last keys, in a decode step."""
        states = self._captured_sequences
        return states is None or all(
            states.has_all_but_the_last(rows[row.row], row.seq_len) for row in sparse
        )

    def _places(
        self, num_rows: int, sparse: Sequence[SparseRow], rows: Mapping[int, Row]
    ) -> np.ndarray:
        """Where what was learned of each row of a decode step is, `[num_rows]`, int32."""
        places = np.zeros(num_rows, np.int32)
        if self._captured_sequences is not None:
            queries = [(rows[row.row], row.seq_len, row.seq_len) for row in sparse]
            found, changes = self._captured_sequences.take(queries)
            assert not changes
            places[[row.row for row in sparse]] = found
        return places

    def _use(self, config_json: str) -> LayerUse:
        return self._planner.use(config_json, self._layers)

    def build_measured(self, common: CommonAttentionMetadata) -> tuple[Any, DeviceStep]:
        """A decode step in which all rows are dense, and the same in which all are sparse.

        What its layers count belongs to no request: see `forget_reads`.

        Args:
            common: Of the step.
        """
        lengths = np.array(self._host_seq_lens(common), np.int32)
        zeros = np.zeros_like(lengths)
        return (
            self._build_dense(common, fast_build=False),
            self._decode_step(common, zeros, lengths, zeros, [], fast_build=False),
        )

    def build_dummy(self, common: CommonAttentionMetadata, config_json: str) -> DeviceStep | None:
        """A step whose only query has any maskers, of a request that nobody asked for.

        What its layers count belongs to no request: see `forget_reads`.

        Args:
            common: Of the step.
            config_json: The maskers.

        Returns:
            None where no layer takes the fast path with them.
        """
        if not self._use(config_json).attentions:
            return None
        (length,) = self._host_seq_lens(common)
        parameters = RequestParameters(config_json, "", 0, None)
        sparse, rows = [SparseRow(0, 0, 1, length, parameters)], {0: Row(parameters, 0, 0)}
        return self._mixed_step(common, np.zeros(1, np.int32), False, sparse, rows, False)

    def forget_reads(self) -> None:
        """See `StepCounter.forget`."""
        self._reads.forget()

    def _settle(
        self,
        common: CommonAttentionMetadata,
        dense: list[DenseRow],
        sparse: list[SparseRow],
    ) -> tuple[list[DenseRow], list[SparseRow]]:
        """Lets automatic rows attend densely where that takes less time."""
        costs, graphs = self._table.costs, self._table.graphs
        if costs is None:
            return dense, sparse
        is_replayed = self._has_graphs and common.max_query_len <= 1
        is_replayed &= common.num_reqs <= self._most_replayed
        is_replayed &= all(row.parameters.config_json == graphs.config_json for row in sparse)
        # With one set of graphs, the launches of maskers are in each.
        is_paid = is_replayed and not graphs.has_dense_graphs
        return settle_automatic(dense, sparse, costs.of_step(is_replayed), is_paid)

    def _decode_step(
        self,
        common: CommonAttentionMetadata,
        whole: np.ndarray,
        lengths: np.ndarray,
        places: np.ndarray,
        sparse: Sequence[SparseRow],
        fast_build: bool,
    ) -> DeviceStep:
        """A step in memory that CUDA graphs know.

        Args:
            common: Of the step, of one query per row.
            whole: `[num_rows]`, int32: keys that dense rows see, 0 for others.
            lengths: `[num_rows]`, int32: keys that sparse rows see, 0 for others.
            places: `[num_rows]`, int32: where what was learned of them is.
            sparse: The rows.
            fast_build: See `build`.
        """
        assert self._captured is not None
        table, number = self._step_table, common.num_reqs
        table.fill(whole, lengths, places)
        use = self._use(self._captured)
        batch = DeviceBatch(
            common.block_table_tensor,
            table.rows[:number],
            table.lengths[:number],
            table.places[:number],
        )
        group = DeviceGroup(
            config_json=self._captured,
            tokens=None,
            batch=batch,
            sizes=table.sizes(number),
            reads=self._reads.values[:number],
            rows=tuple(sparse),
            counts=GroupCounts.of(sparse),
            sequences=StepSequences(batch) if use.learns else None,
            whole=table.whole[:number],
        )
        if sparse:
            own = np.array([row.row for row in sparse])
            counted = CountedGroup(group.counts, own, lengths[own].astype(np.int64), use)
            self._reads.open((counted,), group.reads)
        return DeviceStep(
            dense=None,
            whole=self._build_whole(common, [use], fast_build),
            groups=(group,),
            block_table=common.block_table_tensor,
        )

    def _mixed_step(
        self,
        common: CommonAttentionMetadata,
        dense: np.ndarray,
        has_dense: bool,
        sparse: Sequence[SparseRow],
        rows: Mapping[int, Row],
        fast_build: bool,
    ) -> DeviceStep:
        """Any other step, in memory of its own.

        Args:
            common: Of the step.
            dense: `[num_rows]`, int32, see `dense_lengths`.
            has_dense: Whether any query is dense.
            sparse: The sparse parts of rows.
            rows: See `split_rows`.
            fast_build: See `build`.
        """
        groups, counted, start = [], [], 0
        for use, own in launches_of(sparse, rows, self._use, self._sequences):
            table, reads = common.block_table_tensor, self._reads.values[start:]
            group, lengths = mixed_group(own, use, rows, self._sequences, table, reads)
            end = start + len(lengths)
            groups.append(group)
            counted.append(
                CountedGroup(group.counts, np.arange(start, end), lengths.astype(np.int64), use)
            )
            start = end
        self._reads.open(counted, self._reads.values[:start])
        masked = None
        if has_dense:
            masked = self._build_masked(common, upload(dense, self.device), dense, fast_build)
        return DeviceStep(
            dense=masked,
            whole=self._build_whole(common, [group.use for group in counted], fast_build),
            groups=tuple(groups),
            block_table=common.block_table_tensor,
        )

    def _build_dense(self, common: CommonAttentionMetadata, fast_build: bool) -> Any:
        return super(SparseAttentionMetadataBuilder, self).build(0, common, fast_build)

    def _build_whole(
        self, common: CommonAttentionMetadata, uses: Sequence[LayerUse], fast_build: bool
    ) -> Any:
        """The dense metadata for layers that stay dense; None where there are none."""
        if self._has_dense_layers or any(use.dense_layers for use in uses):
            return self._build_dense(common, fast_build)
        return None

    def _build_masked(
        self,
        common: CommonAttentionMetadata,
        seq_lens: torch.Tensor,
        host_seq_lens: np.ndarray,
        fast_build: bool,
    ) -> Any:
        """The dense metadata of other lengths, beside those of the step itself."""
        first = getattr(self, "scheduler_metadata", None)
        if first is not None:  # FlashAttention keeps its schedule in one place for all graphs
            if self._second_schedule is None:
                self._second_schedule = torch.zeros_like(first)
            self.scheduler_metadata = self._second_schedule
        masked = replace(
            common,
            seq_lens=seq_lens,
            seq_lens_cpu_upper_bound=torch.from_numpy(host_seq_lens),
            _num_computed_tokens_cache=None,
        )
        try:
            return self._build_dense(masked, fast_build)
        finally:
            if first is not None:
                self.scheduler_metadata = first

    def _count_fallback(self, sparse: Sequence[SparseRow]) -> None:
        if self._table.counter != self._name:
            return
        for row in sparse:
            count = row.query_end - row.query_start
            self._table.statistics.add_queries(
                row.parameters.tag, sparse=0, dense=count, fallback=count
            )
