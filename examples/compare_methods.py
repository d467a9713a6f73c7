"""Compares methods at equal density: the output error of each layer on real attention inputs.

    python -m examples.compare_methods [--model NAME] [--densities 0.05 0.1 0.2] [--output plots]

One decode step at the end of a long text. Every method gets the same sinks and window; what it may
read beyond them brings it to the density. Prints a table and writes four pictures.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.documents import LONG_DOCUMENT
from examples.small_model import ensure_small_model
from sparse_attention_hub import Granularity, PlotGenerator
from sparse_attention_hub.adapters.attention_observation import (
    LayerReading,
    decode_step_inputs,
    read_layers,
)
from sparse_attention_hub.adapters.calibrate_channels import calibrated_channels
from sparse_attention_hub.sparse_attention.serialization import config_from_dict

SINK, WINDOW = 4, 28


def methods(channel_file: str) -> dict[str, dict[str, Any]]:
    """The compared maskers; their size follows from the density."""
    return {
        "window alone": {"type": "local"},
        "random sample": {"type": "random_sampling"},
        "Quest, page 16": {"type": "quest_top_k", "page_size": 16},
        "Double Sparsity, 8 channels": {
            "type": "double_sparsity_top_k",
            "sorted_channel_file": channel_file,
            "group_factor": 8,
        },
        "PQ, 4 x 6 bits": {"type": "pq_cache", "pq_sub_dim": 16, "pq_bits": 6},
        "SOCKET, 60 x 10 bits": {"type": "socket", "K": 10, "L": 60},
        "oracle top-k": {"type": "oracle_top_k"},
        "oracle top-k, per KV head": {"type": "oracle_top_k", "head_granularity": "kv_head"},
    }


def readings(
    masker: dict[str, Any], density: float, num_keys: int, inputs: Any
) -> list[LayerReading]:
    """What a method reads at a density, sinks and window included."""
    rest = density - (SINK + WINDOW) / num_keys
    sizes: dict[str, dict[str, Any]] = {
        "local": {"window_size": max(1, round(density * num_keys) - SINK)},
        "random_sampling": {"sampling_rate": rest * num_keys / (num_keys - SINK - WINDOW)},
    }
    size = sizes.get(masker["type"], {"heavy_size": rest})
    maskers = [
        {"type": "sink", "sink_size": SINK},
        {"type": "local", "window_size": WINDOW},
        {**masker, **size},
    ]
    return read_layers(config_from_dict({"maskers": maskers}), inputs)


def main(arguments: list[str] | None = None) -> None:
    """Prints the table and writes the pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="left out = a small real model")
    parser.add_argument("--tokens", type=int, default=2000, help="of the text")
    parser.add_argument("--densities", type=float, nargs="+", default=[0.05, 0.1, 0.2])
    parser.add_argument("--output", type=Path, default=Path("plots"))
    options = parser.parse_args(arguments)
    name = options.model or str(ensure_small_model())
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(name)(LONG_DOCUMENT.text)["input_ids"]
    ids, following = ids[: options.tokens], ids[options.tokens : 2 * options.tokens]
    if min(options.densities) * len(ids) <= SINK + WINDOW:
        parser.error(f"densities must leave more than {SINK + WINDOW} of {len(ids)} keys")
    inputs = decode_step_inputs(model, ids)
    options.output.mkdir(parents=True, exist_ok=True)
    channel_file = options.output / "channels.json"
    channel_file.write_text(json.dumps(calibrated_channels(model, following or ids)))

    print(f"{len(ids)} keys, one decode step; error: mean of |sparse - dense| / |dense|\n")
    columns = [f"{density:.0%} wanted: density, error" for density in options.densities]
    print(f"| method | {' | '.join(columns)} |")
    print("|---" * (len(options.densities) + 1) + "|")
    curves: dict[str, dict[str, list[float]]] = {}
    last: dict[str, list[LayerReading]] = {}
    for method, masker in methods(str(channel_file)).items():
        curve: dict[str, list[float]] = {"density": [], "error": []}
        for density in options.densities:
            last[method] = readings(masker, density, len(ids), inputs)
            layers = last[method]
            curve["density"].append(torch.stack([r.density for r in layers]).mean().item())
            curve["error"].append(torch.stack([r.error for r in layers]).mean().item())
        curves[method] = curve
        cells = zip(curve["density"], curve["error"], strict=True)
        print(f"| {method} | " + " | ".join(f"{d:.3f}, {e:.4f}" for d, e in cells) + " |")

    plots = PlotGenerator(options.output)
    shown = last["Quest, page 16"]
    middle = shown[len(shown) // 2]
    files = [
        plots.generate_comparison_plot(curves, title="output error of one decode step"),
        plots.generate_plot(
            Granularity.PER_HEAD,
            {"density": torch.stack([reading.density for reading in shown])},
            "quest",
            "density, Quest",
        ),
        plots.generate_plot(
            Granularity.PER_TOKEN,
            {"keys_read": middle.keys_read},
            "quest",
            f"keys that one step read in layer {middle.layer}, Quest",
        ),
        plots.generate_plot(
            Granularity.PER_LAYER,
            {method: [r.error.mean().item() for r in layers] for method, layers in last.items()},
            "error",
            f"output error at {options.densities[-1]:.0%}",
        ),
    ]
    print("\n" + "\n".join(files))


if __name__ == "__main__":
    main()
