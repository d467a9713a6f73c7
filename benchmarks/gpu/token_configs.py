"""What the engines of both devices are asked, whose tokens are compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.gpu.engine_answers import Asked
from benchmarks.gpu.tiny_models import CHANNELS, prompts

Maskers = list[dict[str, Any]]
FIXED: Maskers = [{"type": "sink", "sink_size": 4}, {"type": "local", "window_size": 16}]
_PAGES = {"type": "quest_top_k", "heavy_size": 0.15, "page_size": 16}
_ADAPTIVE = {
    "type": "adaptive_sampling",
    "base_rate_sampling": 0.05,
    "epsilon": 0.2,
    "delta": 0.2,
    "init_offset": 0,
    "local_offset": 0,
}
LENGTHS = [17, 200, 333, 480]
TOKENS = 24
EIGHT_BITS = "Quest, on a cache of 8 bits"

_MODELS = {
    "Quest, with sinks and a window": "granite-swa",
    "Quest, recurrent layers": "granite-hybrid",
}


def model_of(config: str) -> str:
    """The kind of model that a list of maskers is served with."""
    return _MODELS.get(config, "llama")


def options_of(config: str) -> dict[str, Any]:
    """What the engine of a list of maskers is started with, besides."""
    return {"kv_cache_dtype": "fp8"} if config == EIGHT_BITS else {}


def token_configs(folder: Path) -> dict[str, Maskers]:
    """Masker lists by name.

    Args:
        folder: Of the Llama.
    """
    heavy = {"type": "oracle_top_k", "heavy_size": 0.1}
    labels = {
        "type": "double_sparsity_top_k",
        "heavy_size": 0.1,
        "group_factor": 4,
        "sorted_channel_file": str(folder / CHANNELS),
    }
    kv_head = {"head_granularity": "kv_head"}
    return {
        "sink + window": FIXED,
        "Quest, per KV head": [*FIXED, _PAGES | kv_head],
        "Quest, 4 bits, per query head": [*FIXED, _PAGES | {"label_bits": 4}],
        "oracle top-k": [*FIXED, heavy],
        "oracle top-p": [*FIXED, {"type": "oracle_top_p", "top_p": 0.8}],
        "Double Sparsity, per KV head": [*FIXED, labels | kv_head],
        "PQCache": [*FIXED, {**heavy, "type": "pq_cache", "pq_sub_dim": 16, "pq_bits": 4}],
        "random sample": [*FIXED, {"type": "random_sampling", "sampling_rate": 0.1, "seed": 3}],
        "vAttention over Quest": [*FIXED, _PAGES | kv_head, _ADAPTIVE | kv_head],
        EIGHT_BITS: [*FIXED, _PAGES | kv_head],
        **{name: [*FIXED, _PAGES | kv_head] for name in _MODELS},
    }


def requests() -> list[Asked]:
    """Some sparse, one dense among them; all at once."""
    found = []
    for number, prompt in enumerate(prompts(LENGTHS)):
        mode = "off" if number == 1 else "on"
        found.append(Asked(f"request-{number}", prompt, TOKENS, {"sparse_attention": mode}))
    return found
