"""One decode step of the research path against a dense-mask simulation and dense SDPA.

    python -m benchmarks.research_attention [--keys 8192 32768] [--repetitions 7]

All are run in turns in one process on the same tensors: batch 1, 32 query / 8 KV heads, head size
128, float32. The simulation is what a plain implementation of the same configuration does: keys and
values repeated per query head, one full score matrix per masker that scores and one more in the
attention, dense masks added up. Maskers that keep labels of keys have them from earlier steps, but
label the newest key, as in decoding.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from tqdm import tqdm

from sparse_attention_hub.sparse_attention import ResearchAttention
from sparse_attention_hub.sparse_attention.research_attention.maskers.fixed.implementations.utils.double_sparsity_utils import (  # noqa: E501
    channel_key,
)
from sparse_attention_hub.sparse_attention.serialization import config_from_dict
from sparse_attention_hub.sparse_attention.utils.hashattention_utils import save_hat_weights
from sparse_attention_hub.sparse_attention.utils.mask_attention_utils import (
    get_masked_attention_output,
)

HEADS, KV_HEADS, HEAD_SIZE = 32, 8, 128
SCALING = HEAD_SIZE**-0.5
SINK_LOCAL = [{"type": "sink", "sink_size": 128}, {"type": "local", "window_size": 128}]
ADAPTIVE = {
    "type": "adaptive_sampling",
    "base_rate_sampling": 0.02,
    "epsilon": 0.1,
    "delta": 0.1,
    "init_offset": 0,
    "local_offset": 0,
}


def configurations(num_keys: int, folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The measured masker lists, by name; about 10 % of the keys each."""
    heavy = {"oracle top-k": {"type": "oracle_top_k", "heavy_size": 0.1}}
    heavy |= label_maskers(folder)
    lists = {
        name: [*SINK_LOCAL, {**masker, "heavy_size": 0.1 - 256 / num_keys}]
        for name, masker in heavy.items()
    }
    lists["vAttention"] = [*SINK_LOCAL, {"type": "oracle_top_k", "heavy_size": 0.05}, ADAPTIVE]
    return lists


def label_maskers(folder: Path) -> dict[str, dict[str, Any]]:
    """Maskers that rank keys by pages or labels."""
    orders = [torch.randperm(HEAD_SIZE).tolist() for _ in range(HEADS)]
    channels = folder / "channels.json"
    channels.write_text(json.dumps({channel_key(0, "qk_proj"): orders}))
    weights = {
        part: [torch.randn(HEADS, *size)]
        for side in ("query", "key")
        for part, size in ((f"{side}_matrix", (HEAD_SIZE, 32)), (f"{side}_bias", (32,)))
    }
    save_hat_weights({0: weights}, folder / "weights.safetensors")
    return {
        "Quest, page 16": {"type": "quest_top_k", "page_size": 16},
        "Quest, page 16, per KV head": {
            "type": "quest_top_k",
            "page_size": 16,
            "head_granularity": "kv_head",
        },
        "Double Sparsity, 8 channels": {
            "type": "double_sparsity_top_k",
            "sorted_channel_file": str(channels),
        },
        "HashAttention, 32 bits": {
            "type": "hash_attention_top_k",
            "hat_bits": 32,
            "hat_mlp_layers": 1,
            "hat_mlp_hidden_size": 1,
            "hat_mlp_activation": "silu",
            "hat_weight_file": str(folder / "weights.safetensors"),
        },
        "PQ, 8 x 6 bits": {
            "type": "pq_cache",
            "pq_sub_dim": 16,
            "pq_bits": 6,
            "kmeans_iterations": 2,
        },
    }


def simulated(
    maskers: list[dict[str, Any]], query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> torch.Tensor:
    """The plain dense-mask implementation of sink, local, oracle top-k and adaptive sampling."""
    group, num_keys = HEADS // KV_HEADS, key.shape[2]
    total = torch.zeros(1, HEADS, 1, num_keys)
    for masker in maskers:
        mask = torch.zeros_like(total)
        if masker["type"] == "sink":
            mask[..., : masker["sink_size"]] = 1
        elif masker["type"] == "local":
            mask[..., num_keys - masker["window_size"] :] = 1
        elif masker["type"] == "oracle_top_k":
            scores = query @ key.repeat_interleave(group, dim=1).transpose(2, 3)
            scores = scores.masked_fill(total > 0, torch.finfo(scores.dtype).min)
            best = scores.topk(int(masker["heavy_size"] * num_keys), dim=-1).indices
            mask.scatter_(-1, best, 1.0)
        else:
            scores = query @ key.repeat_interleave(group, dim=1).transpose(2, 3) * SCALING
            mass = torch.exp(scores - scores.amax(dim=-1, keepdim=True))
            base = torch.randint(num_keys, (1, HEADS, 1, int(0.02 * num_keys)))
            deviation = mass.gather(-1, base).std(dim=-1, keepdim=True)
            size = (total == 0).sum(dim=-1, keepdim=True)
            wanted = (1.645 * deviation * size / (0.1 * mass.sum(dim=-1, keepdim=True))) ** 2
            count = wanted.clamp(base.shape[-1]).minimum(size).long()
            chance = count / size
            mask = torch.where((torch.rand(total.shape) < chance) & (total == 0), chance, mask)
        total = (total + mask).clamp(max=1)
    scores = query @ key.repeat_interleave(group, dim=1).transpose(2, 3) * SCALING
    mass = torch.exp(scores - scores.amax(dim=-1, keepdim=True))
    mass = torch.where(total > 0, mass / (total + 1e-6), 0.0)
    weights = mass / mass.sum(dim=-1, keepdim=True)
    return weights @ value.repeat_interleave(group, dim=1)


def step(
    maskers: list[dict[str, Any]], query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[Callable[[], torch.Tensor], float]:
    """A decode step of the project's own path, and its density."""
    attention = ResearchAttention.create_from_config(config_from_dict({"maskers": maskers}))
    cache: dict[Any, Any] = {}
    before = key[:, :, :-1]
    attention.select(query, before, value[:, :, :-1], None, SCALING, 0.0, cache, layer_idx=0)

    def run() -> torch.Tensor:
        mask = attention.select(query, key, value, None, SCALING, 0.0, cache, layer_idx=0)
        return get_masked_attention_output(None, query, key, value, None, SCALING, 0.0, mask)

    mask = attention.select(query, key, value, None, SCALING, 0.0, cache, layer_idx=0)
    return run, mask.get_density()


def measure(num_keys: int, repetitions: int) -> list[str]:
    """Rows of the table for one context length."""
    torch.manual_seed(0)
    query = torch.randn(1, HEADS, 1, HEAD_SIZE)
    key, value = (torch.randn(1, KV_HEADS, num_keys, HEAD_SIZE) for _ in range(2))
    runs: dict[str, Callable[[], torch.Tensor]] = {
        "SDPA": lambda: scaled_dot_product_attention(
            query, key, value, scale=SCALING, enable_gqa=True
        )
    }
    densities: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        lists = configurations(num_keys, Path(folder))
        for name, maskers in lists.items():
            runs[name], densities[name] = step(maskers, query, key, value)
    for name in ("oracle top-k", "vAttention"):
        runs[f"{name}, simulated"] = lambda name=name: simulated(lists[name], query, key, value)  # type: ignore[misc]
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repetition in tqdm(range(repetitions + 1), desc=f"{num_keys} keys"):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            if repetition:  # the first one warms up
                times[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(values) for name, values in times.items()}
    lines = []
    for name, density in densities.items():
        simulation = medians.get(f"{name}, simulated")
        against = f"{simulation / medians[name]:.1f}x" if simulation else "-"
        lines.append(
            f"| {num_keys} | {name} | {density:.3f} | {medians[name] * 1e3:.1f} | "
            f"{medians['SDPA'] / medians[name]:.2f}x | {against} |"
        )
    return lines


def main() -> None:
    """Measures and prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keys", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with torch.inference_mode():
        lines = [
            line for num_keys in arguments.keys for line in measure(num_keys, arguments.repetitions)
        ]
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, "
        f"{arguments.threads} threads, torch {torch.__version__}; medians of "
        f"{arguments.repetitions} interleaved runs; float32, batch 1, {HEADS} query / {KV_HEADS} "
        f"KV heads, head size {HEAD_SIZE}\n"
    )
    print("| keys | maskers | density | ms | faster than SDPA | faster than simulation |")
    print("|---|---|---|---|---|---|")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
