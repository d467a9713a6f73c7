"""Throughput of `vllm serve` with the plugin against stock vLLM, end to end.

    python -m benchmarks.served_throughput [--cells short long] [--repetitions 3] [--layers 30]

Two servers, alike but for the plugin, asked in turn with the `openai` client. Each request has a
prompt of its own. Prompts are prefilled one after the other (tokens per second: prefill); then all
are sent at once, find their prompts in the prefix cache, and are decoded together (tokens per
second from the first token of the last request to start until the first one ends: decode).
The cell "64k" has a model of the small one's shape with random weights and scaled positions; its
prefill takes about a minute per layer and server on two cores, so that `--layers` may be lowered.
Results go to benchmarks/results/served_throughput.json and .md, those of other cells stay. Run on a
quiet machine.
"""

from __future__ import annotations

import argparse
import json
import os
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

from benchmarks.machine import processor_name
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
        positions: For which the model is stretched, with random weights; None = the real model.
    """

    prompt_tokens: int
    requests: int
    decode_tokens: int
    is_sparse: bool
    bars: tuple[float, float]
    positions: int | None = None


CELLS = {
    "dense": Cell(2000, 1, 64, False, (0.95, 1.0)),
    "short": Cell(500, 8, 64, True, (0.95, 0.97)),
    "medium": Cell(4000, 4, 64, True, (0.95, 1.0)),
    "long": Cell(7500, 8, 64, True, (0.95, 2.5)),
    "64k": Cell(65_000, 1, 64, True, (0.95, 2.5), positions=65_536),
}


def stretched(positions: int, layers: int) -> list[str]:
    """Arguments of `vllm serve` for a model of the small one's shape with more positions."""
    overrides = {
        "max_position_embeddings": positions,
        "num_hidden_layers": layers,
        "rope_parameters": {"rope_type": "linear", "factor": 8.0, "rope_theta": 100_000.0},
    }
    return [
        "--load-format",
        "dummy",
        "--hf-overrides",
        json.dumps(overrides),
        "--max-model-len",
        str(positions),
    ]


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


def run(names: list[str], repetitions: int, layers: int) -> dict[str, Any]:
    """What each cell gave."""
    model = str(ensure_small_model())
    tokenizer = AutoTokenizer.from_pretrained(model)
    cells = {}
    for positions in dict.fromkeys(CELLS[name].positions for name in names):
        arguments = [*ARGUMENTS, *(stretched(positions, layers) if positions else [])]
        with (
            ModelServerVLLM(
                model,
                arguments=arguments,
                environment={**ENVIRONMENT, "SPARSE_ATTENTION_PLUGIN_DISABLED": "1"},
            ) as stock,
            ModelServerVLLM(model, SPARSE, arguments=arguments, environment=ENVIRONMENT) as plugin,
        ):
            servers = {"stock": stock, "plugin": plugin}
            for name in names:
                if CELLS[name].positions == positions:
                    cells[name] = {
                        **measure(servers, CELLS[name], tokenizer, repetitions, name),
                        "date": date.today().isoformat(),
                        "machine": f"{processor_name()}, {os.cpu_count()} cores",
                        "versions": {
                            name: version(name) for name in ("vllm-cpu", "torch", "transformers")
                        },
                        "commit": subprocess.run(
                            ["git", "rev-parse", "--short", "HEAD"],
                            capture_output=True,
                            text=True,
                            check=False,
                        ).stdout.strip(),
                        "model": f"SmolLM2-135M's shape, {layers} layers, random weights"
                        if positions
                        else "SmolLM2-135M-Instruct",
                        "repetitions": repetitions,
                    }
    return cells


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


def to_markdown(cells: dict[str, Any]) -> str:
    """The report for a person."""
    lines = [
        "# vllm serve with the plugin against stock vLLM",
        "",
        f"float32; maskers of sparse cells: `{json.dumps(SPARSE)}`; medians of repetitions in "
        "turns (long prompts are prefilled once).",
        "",
        "| cell | requests x prompt | mode | density | phase | stock tokens/s | plugin tokens/s "
        "| ratio | bar |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, result in cells.items():
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
    lines.append("")
    for name, result in cells.items():
        lines.append(
            f"- {name}: {result['date']}, {result['machine']}, {result['versions']}, commit "
            f"{result['commit']}; {result['model']}; {result['repetitions']} repetitions"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measures, prints a table and writes it down."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cells", nargs="+", choices=list(CELLS), default=list(CELLS))
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--layers", type=int, default=30, help="of the cell 64k")
    arguments = parser.parse_args()
    file = RESULTS / "served_throughput.json"
    known = json.loads(file.read_text()) if file.exists() else {}
    known.update(run(arguments.cells, arguments.repetitions, arguments.layers))
    cells = {name: known[name] for name in CELLS if name in known}
    file.write_text(json.dumps(cells, indent=2) + "\n")
    text = to_markdown(cells)
    (RESULTS / "served_throughput.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
