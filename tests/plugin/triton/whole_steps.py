"""Steps of an engine as launches, on tensors without memory: keys written, and attention.

Requests, lengths and values are not there; shapes, strides, types and alignment are an engine's.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sparse_attention_hub.sparse_attention.serialization import config_from_dict, config_to_json
from sparse_attention_hub.sparse_attention.utils.hashattention_utils import save_hat_weights
from vllm_sparse_plugin.paged.device.attention import device_maskers
from vllm_sparse_plugin.paged.device.cache import DeviceCache
from vllm_sparse_plugin.paged.device.planner import DevicePlanner, Limits
from vllm_sparse_plugin.paged.device.sequences import Change, StepSequences, prefix_of
from vllm_sparse_plugin.paged.layout import BlockLayout, BlockShape
from vllm_sparse_plugin.paged.served import indices_of
from vllm_sparse_plugin.paged.triton_kernels.cache_rows import DeviceBatch

META = torch.device("meta")
SINK_LOCAL = [{"type": "sink", "sink_size": 128}, {"type": "local", "window_size": 128}]
QUEST = {"type": "quest_top_k", "heavy_size": 2048, "page_size": 16, "label_bits": 4}
ORACLE = {"type": "oracle_top_k", "heavy_size": 0.1}
ADAPTIVE = {
    "type": "adaptive_sampling",
    "base_rate_sampling": 0.05,
    "epsilon": 0.1,
    "delta": 0.1,
    "init_offset": 128,
    "local_offset": 128,
}
GRANULARITIES = ("kv_head", "query_head")


@dataclass(frozen=True)
class Engine:
    """A model, and how much of anything there is.

    Attributes:
        heads: Query heads.
        kv_heads: KV heads.
        head_size: Channels.
        dtype: Of queries, keys and values.
        has_eight_bits: Whether keys and values are stored in 8 bits.
        capacity: Keys of a sequence.
        max_queries: Requests of a step.
        block_size: Keys of a block.
    """

    heads: int = 32
    kv_heads: int = 8
    head_size: int = 128
    dtype: torch.dtype = torch.bfloat16
    capacity: int = 1 << 17
    max_queries: int = 64
    block_size: int = 16
    has_eight_bits: bool = False

    @property
    def shape(self) -> BlockShape:
        stored = torch.float8_e4m3fn if self.has_eight_bits else self.dtype
        return BlockShape(self.block_size, self.heads, self.kv_heads, self.head_size, stored)


def masker_lists(engine: Engine, folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Every masker, in the lists that an engine would have; by name.

    Args:
        engine: That they are for.
        folder: For the files that some need.
    """
    lists: dict[str, list[dict[str, Any]]] = {"sink, local": SINK_LOCAL}
    for who in GRANULARITIES:
        by = {"head_granularity": who}
        quest = {**QUEST, **by}
        for bits in (2, 4, 8, 16):
            lists[f"quest {bits}, {who}"] = [*SINK_LOCAL, {**quest, "label_bits": bits}]
        lists[f"oracle, {who}"] = [*SINK_LOCAL, {**ORACLE, **by}]
        for bits in (2, 4, 8, 16):
            labels = {
                "type": "double_sparsity_top_k",
                "heavy_size": 0.1,
                "sorted_channel_file": _channel_file(engine, folder, who),
                "group_factor": 4,
                "label_bits": bits,
            }
            lists[f"double sparsity {bits}, {who}"] = [*SINK_LOCAL, {**labels, **by}]
        for activation in ("relu", "silu"):
            hashes = {
                "type": "hash_attention_top_k",
                "heavy_size": 0.1,
                "hat_bits": 32,
                "hat_mlp_layers": 3,
                "hat_mlp_hidden_size": 128,
                "hat_mlp_activation": activation,
                "hat_weight_file": _weight_file(engine, folder, who),
            }
            lists[f"hash {activation}, {who}"] = [*SINK_LOCAL, {**hashes, **by}]
        codes = {"type": "pq_cache", "heavy_size": 0.1, "pq_sub_dim": engine.head_size // 4}
        for bits in (4, 6):
            lists[f"pq {bits}, {who}"] = [*SINK_LOCAL, {**codes, "pq_bits": bits, **by}]
        sampling = {"type": "random_sampling", "sampling_rate": 0.05, **by}
        lists[f"sampling, {who}"] = [*SINK_LOCAL, sampling]
        lists[f"quest, adaptive sampling, {who}"] = [*SINK_LOCAL, quest, {**ADAPTIVE, **by}]
    for tables, bits in ((75, 8), (150, 10)):
        buckets = {"type": "magic_pig", "lsh_l": tables, "lsh_k": bits}
        lists[f"magic pig {tables} x {bits}"] = [*SINK_LOCAL, buckets]
    lists["top p"] = [*SINK_LOCAL, {"type": "oracle_top_p", "top_p": 0.9}]
    by_group = {"head_granularity": "kv_head"}
    lists["oracle, adaptive sampling, kv_head"] = [
        *SINK_LOCAL,
        {**ORACLE, **by_group},
        {**ADAPTIVE, **by_group},
    ]
    other = {**ADAPTIVE, "base_rate_sampling": 64, **by_group}
    oracle = {**ORACLE, "head_granularity": "query_head"}
    lists["oracle, adaptive sampling of others"] = [*SINK_LOCAL, oracle, other]
    return lists


def _channel_file(engine: Engine, folder: Path, who: str) -> str:
    rows = engine.heads if who == "query_head" else engine.kv_heads
    path = folder / f"channels-{rows}-{engine.head_size}.json"
    order = [list(range(engine.head_size))] * rows
    path.write_text(json.dumps({"model.layers.0.self_attn.qk_proj": order}))
    return str(path)


def _weight_file(engine: Engine, folder: Path, who: str) -> str:
    heads, networks = engine.heads, engine.heads if who == "query_head" else engine.kv_heads
    path = folder / f"weights-{heads}-{networks}-{engine.head_size}.safetensors"
    if not path.exists():
        sizes = [(engine.head_size, 128), (128, 128), (128, 32)]
        save_hat_weights(
            {
                0: {
                    f"{side}_{part}": [torch.zeros(count, *size[from_:]) for size in sizes]
                    for side, count in (("query", heads), ("key", networks))
                    for part, from_ in (("matrix", 0), ("bias", 1))
                }
            },
            path,
        )
    return str(path)


class Steps:
    """An engine's layer, ready for steps of any number of queries."""

    def __init__(self, engine: Engine, maskers: list[dict[str, Any]]) -> None:
        """Asks for the memory that an engine would, without any."""
        config = config_from_dict({"maskers": maskers})
        indices = indices_of([config], engine.shape, device_maskers)
        layout = BlockLayout(engine.shape, tuple(indices))
        limits = Limits(engine.max_queries, engine.capacity, max_tokens=8192)
        planner = DevicePlanner(layout, limits, META, config)
        planner.reserve(0)
        attention = planner.attention(config_to_json(config), 0)
        assert attention is not None, maskers
        self.engine, self.attention = engine, attention
        stored = engine.shape.dtype
        width = layout.bytes_per_token // stored.itemsize
        size = (1 << 16, engine.kv_heads, engine.block_size, width)
        kv_cache = self._tensor(*size, dtype=stored)
        self.cache = DeviceCache.of(kv_cache, layout, 0, planner.space)

    def _tensor(self, *size: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.empty(size, dtype=dtype or self.engine.dtype, device=META)

    def _projected(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values of tokens, as a model's one product leaves them."""
        engine = self.engine
        sizes = [heads * engine.head_size for heads in (engine.heads, *[engine.kv_heads] * 2)]
        parts = self._tensor(tokens, sum(sizes)).split(sizes, dim=1)
        query, key, value = (part.view(tokens, -1, engine.head_size) for part in parts)
        return query, key, value

    def write(self, tokens: int) -> None:
        """New keys."""
        _, key, value = self._projected(tokens)
        self.cache.write(key, value, self._tensor(tokens, dtype=torch.int64))

    def attend(self, queries: int, rows: int, changes: bool = False) -> None:
        """Attention of some queries.

        Args:
            queries: How many.
            rows: Of the table that their lengths are in: as many, or those of a CUDA graph.
            changes: Whether a sequence is new.
        """
        query, _, _ = self._projected(queries)
        table = self._tensor(3 + self.attention.num_sizes, rows, dtype=torch.int32)[:, :queries]
        blocks = self.engine.capacity // self.engine.block_size
        batch = DeviceBatch(
            self._tensor(self.engine.max_queries, blocks, dtype=torch.int32), *table[:3]
        )
        output = torch.empty(query.shape, dtype=query.dtype, device=META)
        # Behind those of another group, where there may be one.
        reads = self._tensor(queries + 1, 3, dtype=torch.int64)[int(rows == queries) :]
        scaling = self.engine.head_size**-0.5
        sequences = self._sequences(batch, changes) if self.attention.learns else None
        # In a decode step, dense queries may be among the others.
        whole = None if changes else self._tensor(rows, dtype=torch.int32)[:queries]
        self.attention.attend(
            query, self.cache, batch, table[3:], scaling, output, reads, sequences, whole
        )

    def _sequences(self, batch: DeviceBatch, changes: bool) -> StepSequences:
        """Of a query each; with the longest one new, if there are changes."""
        length = self.engine.capacity - 1
        change = Change(number=0, place=0, length=length, prefix=prefix_of(length))
        return StepSequences(batch, (change,) if changes else ())

    def step(self, queries: int) -> None:
        """A decode step."""
        self.write(queries)
        self.attend(queries, self.engine.max_queries)
