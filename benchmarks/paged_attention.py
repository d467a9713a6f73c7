"""Attention of one decode step on pages, against vLLM's own CPU attention.

    python -m benchmarks.paged_attention [--keys 8192 32768 131072] [--repetitions 15]

In turns in one process, on the same random keys and values: float32, batch 1, 32 query / 8 KV
heads, head size 128, blocks of 128 tokens in random order. A step writes one key and value (with
the index) and attends, planning included; stock vLLM writes and attends with its own operations.
As in a model, a repetition runs the same configuration in several layers, one after the other, each
with keys of its own. Before it comes back to a layer, every other configuration has run, and has
read more than the processor's caches hold: the keys are cold, the code is not. A plain copy of
memory takes its turn as well: what it reaches differs from minute to minute on a shared machine.
Results go to benchmarks/results/paged_attention.json and .md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
from tqdm import tqdm

from benchmarks.machine import processor_name
from benchmarks.paged_report import HOST_KEYS, Row, report
from sparse_attention_hub.sparse_attention.research_attention.maskers.fixed.implementations.utils.double_sparsity_utils import (  # noqa: E501
    channel_key,
)
from sparse_attention_hub.sparse_attention.serialization import config_from_dict, config_to_json
from vllm_sparse_plugin import compat
from vllm_sparse_plugin.masked_attention import attend_row, attention_of
from vllm_sparse_plugin.paged.attention import PagedAttention, QueryBatch, attend_dense
from vllm_sparse_plugin.paged.huge_pages import prefer_huge_pages
from vllm_sparse_plugin.paged.layout import BlockLayout, BlockShape, LayerCache
from vllm_sparse_plugin.paged.prefill import stored_rows

RESULTS = Path(__file__).parent / "results"
HEADS, KV_HEADS, HEAD_SIZE, BLOCK_SIZE, LAYERS = 32, 8, 128, 128, 4
SCALING = HEAD_SIZE**-0.5
SHAPE = BlockShape(BLOCK_SIZE, HEADS, KV_HEADS, HEAD_SIZE, torch.float32)
STOCK = "stock vLLM, dense"
COPY = "a copy of memory"
STOCK_ON_LARGE_PAGES = "stock vLLM, dense, on large memory pages"
STOCK_ON_TENTH = "vLLM's own operation on 10 % of the blocks, nothing selected"
PLUGIN_ON_TENTH = "the plugin's kernel on 10 % of the blocks, nothing selected"
SINK_LOCAL_KEYS = 384
HOST_ROWS = (1, 8, 64)
BARS: dict[str, tuple[float, float, float]] = {
    "dense through the plugin": (1, 1, 1),
    "sink + local, 384 keys": (8, 25, 60),
    "Quest, page 16, 10 %": (4, 8, 9),
    "Quest, page 16, 5 %": (6, 13, 15),
    "Double Sparsity, 10 %": (2.5, 4.5, 5),
    "oracle top-k, 10 %": (1.5, 2, 2),
    "vAttention over Quest": (3, 6, 7),
}
"""Wanted ratios at 8K, 32K and 128K keys; others are measured to be seen."""
Step = Callable[[int], None]


def configurations(num_keys: int, folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Masker lists by name; shares count sinks and window in."""
    sink_local = [{"type": "sink", "sink_size": 128}, {"type": "local", "window_size": 256}]
    channels = {
        channel_key(layer, "qk_proj"): [torch.randperm(HEAD_SIZE).tolist() for _ in range(KV_HEADS)]
        for layer in range(LAYERS)
    }
    file = folder / "channels.json"
    file.write_text(json.dumps(channels))

    def heavy(kind: str, share: float, granularity: str = "kv_head", **fields: Any) -> Any:
        size = share - SINK_LOCAL_KEYS / num_keys
        return [
            *sink_local,
            {"type": kind, "heavy_size": size, "head_granularity": granularity, **fields},
        ]

    pages: dict[str, Any] = {"page_size": 16, "label_bits": 4}
    adaptive = {
        "type": "adaptive_sampling",
        "base_rate_sampling": 0.02,
        "epsilon": 0.1,
        "delta": 0.1,
        "init_offset": 0,
        "local_offset": 0,
        "head_granularity": "kv_head",
    }
    return {
        "sink + local, 384 keys": sink_local,
        "Quest, page 16, 10 %": heavy("quest_top_k", 0.1, **pages),
        "Quest, page 16, 5 %": heavy("quest_top_k", 0.05, **pages),
        "Quest, page 16, 10 %, per query head": heavy("quest_top_k", 0.1, "query_head", **pages),
        "Quest, page 16, 5 %, per query head": heavy("quest_top_k", 0.05, "query_head", **pages),
        "Double Sparsity, 10 %": heavy(
            "double_sparsity_top_k", 0.1, sorted_channel_file=str(file), label_bits=4
        ),
        "oracle top-k, 10 %": heavy("oracle_top_k", 0.1),
        "vAttention over Quest": [*heavy("quest_top_k", 0.05, **pages), adaptive],
        "vAttention over Quest, a sample per query head": [
            *heavy("quest_top_k", 0.05, **pages),
            adaptive | {"head_granularity": "query_head"},
        ],
    }


def filled_caches(layout: BlockLayout, num_keys: int, table: np.ndarray) -> list[torch.Tensor]:
    """A cache per layer, with random keys and values and their index."""
    caches = []
    width = layout.bytes_per_token // 4
    place = torch.arange(num_keys)
    slots = torch.from_numpy(table).long()[place // BLOCK_SIZE] * BLOCK_SIZE + place % BLOCK_SIZE
    for layer in tqdm(range(LAYERS), desc=f"filling layers of {num_keys} keys", leave=False):
        kv_cache = torch.zeros(len(table), KV_HEADS, BLOCK_SIZE, width)
        prefer_huge_pages(kv_cache)  # as the backend does
        cache = LayerCache.of(kv_cache, layout, layer)
        for start in range(0, num_keys, 8192):
            count = min(8192, num_keys - start)
            key, value = (torch.randn(count, KV_HEADS, HEAD_SIZE) for _ in range(2))
            cache.write(key, value, slots[start : start + count])
        caches.append(kv_cache)
    return caches


def stock_caches(num_blocks: int, on_large_pages: bool) -> list[torch.Tensor]:
    """A cache of stock vLLM's per layer: filled with zeros, as vLLM does, and then with numbers.

    Args:
        num_blocks: Of a cache.
        on_large_pages: Whether the memory is then put into large pages, as the plugin's is.
    """
    caches = []
    for _ in range(LAYERS):
        cache = torch.zeros(num_blocks, KV_HEADS, 2 * BLOCK_SIZE, HEAD_SIZE)
        cache.normal_()
        if on_large_pages:
            prefer_huge_pages(cache)
        caches.append(cache)
    return caches


def stock_step(caches: list[torch.Tensor], table: np.ndarray, num_keys: int) -> Step:
    """Stock vLLM's step, cache write included."""
    views = [cache.chunk(2, dim=2) for cache in caches]
    query = torch.randn(1, HEADS, HEAD_SIZE)
    key, value = torch.randn(1, KV_HEADS, HEAD_SIZE), torch.randn(1, KV_HEADS, HEAD_SIZE)
    slot = torch.tensor([int(table[-1]) * BLOCK_SIZE + BLOCK_SIZE - 1])
    attend = compat.cpu_attend(1, num_keys, torch.from_numpy(table)[None], SCALING, "vec")

    def step(layer: int) -> None:
        key_cache, value_cache = views[layer]
        compat.cpu_write_key_value(key, value, key_cache, value_cache, slot, "vec")
        attend(query, key_cache, value_cache)

    return step


def plugin_step(
    attention: PagedAttention | None,
    caches: list[LayerCache],
    batch: QueryBatch,
) -> tuple[Step, float, float]:
    """The plugin's step with some maskers (None = dense), its density and bytes read."""
    query = np.random.default_rng(1).standard_normal((1, HEADS, HEAD_SIZE), np.float32)
    key, value = torch.randn(1, KV_HEADS, HEAD_SIZE), torch.randn(1, KV_HEADS, HEAD_SIZE)
    num_keys = int(batch.lengths[0])
    slot = torch.tensor([int(batch.block_table[0, -1]) * BLOCK_SIZE + BLOCK_SIZE - 1])

    def step(layer: int) -> None:
        caches[layer].write(key, value, slot)
        if attention is None:
            attend_dense(query, caches[layer], batch, SCALING)
        else:
            attention.attend(query, caches[layer], batch, SCALING)

    if attention is None:
        return step, 1.0, num_keys * KV_HEADS * SHAPE.key_value_bytes
    _, read = attention.attend(query, caches[0], batch, SCALING)
    return step, float(read.keys[0]) / (num_keys * HEADS), float(read.loaded_bytes[0])


def check(maskers: list[dict[str, Any]], attention: PagedAttention, layout: BlockLayout) -> None:
    """Refuses to measure what does not compute the right thing.

    Raises:
        AssertionError: The general path gives something else.
    """
    num_keys = 4000
    table = np.random.default_rng(0).permutation(-(-num_keys // BLOCK_SIZE)).astype(np.int32)
    kv_cache = filled_caches(layout, num_keys, table)[0]
    query = torch.randn(1, HEADS, HEAD_SIZE)
    batch = QueryBatch(table[None], np.zeros(1, np.int32), np.array([num_keys], np.int32))
    cache = LayerCache.of(kv_cache, layout, 0)
    found, read = attention.attend(query.numpy(), cache, batch, SCALING)
    key, value = (
        rows.transpose(0, 1)[None]
        for rows in stored_rows(
            cache, torch.from_numpy(table), num_keys, 0, KV_HEADS, kv_cache.dtype
        )
    )
    config = attention_of(config_to_json(config_from_dict({"maskers": maskers})))
    wanted = attend_row(config, query, key, value, SCALING, 0)
    assert abs(int(read.keys[0]) - wanted.read_keys) <= 0.01 * wanted.read_keys, maskers
    error = (torch.from_numpy(found) - wanted.output).norm() / wanted.output.norm()
    assert error < 0.02, (maskers, error)  # a page or key whose scores tie may be another


def copy_step() -> tuple[Step, int]:
    """A copy of memory, and how many bytes it reads and writes."""
    source, target = torch.ones(1 << 25), torch.ones(1 << 25)

    def step(layer: int) -> None:
        target.copy_(source)

    return step, 2 * source.nbytes


def host_milliseconds(rows: int, folder: Path) -> float:
    """Of a layer's step of Quest at 10 %, where there is almost nothing to read.

    Args:
        rows: Requests, of `HOST_KEYS` keys each.
        folder: For files.
    """
    maskers = configurations(8192, folder)["Quest, page 16, 10 %"]
    attention = PagedAttention(config_from_dict({"maskers": maskers}).masker_configs, SHAPE)
    layout = BlockLayout(SHAPE, tuple(i for masker in attention.maskers for i in masker.indices))
    table = np.arange(rows, dtype=np.int32)
    [cache, *_] = filled_caches(layout, rows * BLOCK_SIZE, table)
    view = LayerCache.of(cache, layout, 0)
    lengths = np.full(rows, HOST_KEYS, np.int32)
    batch = QueryBatch(table[:, None], np.arange(rows, dtype=np.int32), lengths)
    query = np.zeros((rows, HEADS, HEAD_SIZE), np.float32)
    key = torch.zeros(rows, KV_HEADS, HEAD_SIZE)
    slots = torch.arange(rows) * BLOCK_SIZE + HOST_KEYS - 1
    times = []
    for _ in range(60):
        started = time.perf_counter()
        view.write(key, key, slots)
        attention.attend(query, view, batch, SCALING)
        times.append(time.perf_counter() - started)
    return statistics.median(times[10:]) * 1e3


def measure(num_keys: int, repetitions: int) -> list[Row]:
    """All configurations at one context length, in turns."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        lists = configurations(num_keys, Path(folder))
        attentions = {
            name: PagedAttention(config_from_dict({"maskers": maskers}).masker_configs, SHAPE)
            for name, maskers in lists.items()
        }
        indices = {
            index: None
            for attention in attentions.values()
            for masker in attention.maskers
            for index in masker.indices
        }
        layout = BlockLayout(SHAPE, tuple(indices))
        for name, maskers in tqdm(lists.items(), desc="checking results", leave=False):
            check(maskers, attentions[name], layout)
    table = np.random.default_rng(0).permutation(num_keys // BLOCK_SIZE).astype(np.int32)
    tensors = filled_caches(layout, num_keys, table)
    caches = [LayerCache.of(tensor, layout, layer) for layer, tensor in enumerate(tensors)]
    batch = QueryBatch(table[None], np.zeros(1, np.int32), np.array([num_keys], np.int32))
    ordinary, large = (stock_caches(len(table), is_large) for is_large in (False, True))
    steps = {
        STOCK: (stock_step(ordinary, table, num_keys), 1.0, 0.0),
        STOCK_ON_LARGE_PAGES: (stock_step(large, table, num_keys), 1.0, 0.0),
    }
    steps["dense through the plugin"] = plugin_step(None, caches, batch)
    tenth = round(len(table) / 10)
    few = QueryBatch(table[None, :tenth], batch.rows, np.array([tenth * BLOCK_SIZE], np.int32))
    share = tenth / len(table)
    loaded = float(tenth * BLOCK_SIZE * KV_HEADS * SHAPE.key_value_bytes)
    on_tenth = stock_step(large, table[:tenth], tenth * BLOCK_SIZE)
    steps[STOCK_ON_TENTH] = (on_tenth, share, loaded)
    steps[PLUGIN_ON_TENTH] = (plugin_step(None, caches, few)[0], share, loaded)
    copy, copied = copy_step()
    steps[COPY] = (copy, 1.0, copied)
    for name, attention in attentions.items():
        steps[name] = plugin_step(attention, caches, batch)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for repetition in tqdm(range(repetitions + 1), desc=f"{num_keys} keys"):
        for name, (step, _, _) in steps.items():
            started = time.perf_counter()
            for layer in range(LAYERS):
                step(layer)
            if repetition:  # the first one warms up
                times[name].append((time.perf_counter() - started) / LAYERS)
    medians = {name: statistics.median(values) for name, values in times.items()}
    bandwidth = copied / medians.pop(COPY)
    rows = []
    for name in medians:
        _, density, read = steps[name]
        wanted = BARS.get(name)
        place = {8192: 0, 32768: 1, 131072: 2}.get(num_keys)
        read = read or num_keys * KV_HEADS * SHAPE.key_value_bytes
        rows.append(
            Row(
                num_keys,
                name,
                medians[name] * 1e3,
                medians[STOCK] / medians[name],
                wanted[place] if wanted is not None and place is not None else None,
                density,
                read / 1e6,
                read / medians[name] / bandwidth,
            )
        )
    return rows


def main() -> None:
    """Measures, prints a table and writes it down."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keys", type=int, nargs="+", default=[8192, 32768, 131072])
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULTS / "paged_attention")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    numba.set_num_threads(arguments.threads)
    compat.load_cpu_operations()
    with torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
        rows = [
            row for num_keys in arguments.keys for row in measure(num_keys, arguments.repetitions)
        ]
        host = {count: host_milliseconds(count, Path(folder)) for count in HOST_ROWS}
    machine = (
        f"{date.today()}: {processor_name()}, {os.cpu_count()} cores, {arguments.threads} threads; "
        f"vLLM {compat.installed_vllm_version()}, torch {torch.__version__}, numba "
        f"{version('numba')}; medians of {arguments.repetitions} interleaved passes over {LAYERS} "
        f"layers; float32, batch 1, {HEADS} query / {KV_HEADS} KV heads, head size {HEAD_SIZE}"
    )
    text = report(rows, host, machine)
    print(text)
    arguments.output.with_suffix(".md").write_text(text)
    content = {"machine": machine, "rows": [asdict(row) for row in rows], "host_ms": host}
    arguments.output.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
