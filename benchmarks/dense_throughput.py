"""Dense requests through the plugin against stock vLLM: throughput of prefill and decode.

Two servers, alike but for the plugin, are asked in turn; the ratio of medians is printed and
written to `benchmarks/results/`. Run on a quiet machine: `make bench`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import openai
from tqdm import tqdm
from transformers import AutoTokenizer

from examples.small_model import ensure_small_model
from sparse_attention_hub.adapters import ModelServerVLLM

RESULTS = Path(__file__).parent / "results"
PROMPT_TOKENS = 2000
DECODE_TOKENS = 64
ARGUMENTS = ["--dtype", "float32", "--max-num-seqs", "4", "--enforce-eager"]
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1"}
BAR = 0.9


def measure(server: ModelServerVLLM, prompt: list[int], salt: str) -> tuple[float, float]:
    """Tokens per second of one request's prefill and of its decoding.

    Args:
        server: To ask.
        prompt: Token ids.
        salt: Of the prefix cache: a new one means a cold prefill.
    """
    client = openai.OpenAI(base_url=server.base_url, api_key="none")
    times = []
    started = time.perf_counter()
    for chunk in client.completions.create(
        model=server.model_name,
        prompt=prompt,
        max_tokens=DECODE_TOKENS,
        temperature=0,
        stream=True,
        extra_body={"cache_salt": salt, "ignore_eos": True, "return_token_ids": True},
    ):
        times += [time.perf_counter() for choice in chunk.choices for _ in choice.token_ids or []]  # type: ignore[attr-defined]
    return len(prompt) / (times[0] - started), (len(times) - 1) / (times[-1] - times[0])


def processor_name() -> str:
    """Of this machine."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def run(repetitions: int) -> dict[str, Any]:
    """The report."""
    model = str(ensure_small_model())
    tokenizer = AutoTokenizer.from_pretrained(model)
    prompt = tokenizer.encode(topics["string-methods"])[:PROMPT_TOKENS]
    dense = {"maskers": [{"type": "sink", "sink_size": 4}], "sparse_by_default": False}
    rates: dict[str, list[tuple[float, float]]] = {"stock": [], "plugin": []}
    with (
        ModelServerVLLM(
            model,
            arguments=ARGUMENTS,
            environment={**ENVIRONMENT, "SPARSE_ATTENTION_PLUGIN_DISABLED": "1"},
        ) as stock,
        ModelServerVLLM(model, dense, arguments=ARGUMENTS, environment=ENVIRONMENT) as plugin,
    ):
        servers = {"stock": stock, "plugin": plugin}
        for server in servers.values():
            measure(server, prompt, "warm-up")
        for repetition in tqdm(range(repetitions), desc="repetitions"):
            order = list(servers) if repetition % 2 else list(reversed(servers))
            for name in order:
                rates[name].append(measure(servers[name], prompt, f"salt-{repetition}"))
    report: dict[str, Any] = {
        "date": date.today().isoformat(),
        "machine": f"{processor_name()}, {os.cpu_count()} cores",
        "versions": {name: version(name) for name in ("vllm-cpu", "torch", "transformers")},
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
        ).stdout.strip(),
        "repetitions": repetitions,
        "protocol": f"one request at a time, {PROMPT_TOKENS} prompt tokens (cold), {DECODE_TOKENS} "
        f"generated, SmolLM2-135M-Instruct float32, {repetitions} repetitions, servers in turn",
    }
    for index, phase in enumerate(("prefill", "decode")):
        medians = {name: statistics.median(r[index] for r in rates[name]) for name in rates}
        report[phase] = {
            **{f"{name}_tokens_per_s": value for name, value in medians.items()},
            "ratio": medians["plugin"] / medians["stock"],
        }
    return report


def to_markdown(report: dict[str, Any]) -> str:
    """The report for a person."""
    lines = [
        "# Dense requests: plugin against stock vLLM",
        "",
        f"{report['date']}, {report['machine']}, {report['versions']}, commit {report['commit']}.",
        f"Protocol: {report['protocol']}.",
        f"Command: `python -m benchmarks.dense_throughput --repetitions {report['repetitions']}`.",
        "",
        "| phase | stock tokens/s | plugin tokens/s | ratio (bar 0.9) |",
        "|---|---|---|---|",
    ]
    for phase in ("prefill", "decode"):
        row = report[phase]
        lines.append(
            f"| {phase} | {row['stock_tokens_per_s']:.1f} | {row['plugin_tokens_per_s']:.1f} "
            f"| {row['ratio']:.3f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    """Returns 0 when both ratios reach the bar."""
    parser = argparse.ArgumentParser(description="Dense throughput: plugin against stock vLLM")
    parser.add_argument("--repetitions", type=int, default=9)
    report = run(parser.parse_args().repetitions)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "dense_throughput.json").write_text(json.dumps(report, indent=2) + "\n")
    (RESULTS / "dense_throughput.md").write_text(to_markdown(report))
    print(to_markdown(report))
    return 0 if all(report[phase]["ratio"] >= BAR for phase in ("prefill", "decode")) else 1


if __name__ == "__main__":
    raise SystemExit(main())
