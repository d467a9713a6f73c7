"""One JSON file and one Markdown file of all stages.

    python -m benchmarks.gpu.report --output FOLDER

Reads what stages have left in the folder: `NAME.json`, and `NAME.status` with an exit status and
seconds. Stages that were run at other times, or of other commits, say so.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.gpu.bars import Bar, Results, all_bars, engine_rows
from benchmarks.gpu.cells import LAYERS
from benchmarks.gpu.command import SKIPPED
from vllm_sparse_plugin.paged.device.cost_model import AttentionCosts, CostModel, Point, StepLoad

STAGES: dict[str, str] = {
    "environment": "the machine",
    "kernels": "kernels against references in float64 (tests/plugin/triton)",
    "tokens": "engine: tokens against the CPU path's",
    "graphs": "engine: CUDA graphs against eager",
    "small_memcheck": "compute-sanitizer memcheck, small cases",
    "small_racecheck": "compute-sanitizer racecheck, small cases",
    "bandwidth": "kernels against a copy's bandwidth",
    "attention": "attention of a decode step",
    "engine_dense": "decode throughput, dense, 1K to 128K",
    "engine_sparse-long": "decode throughput, sparse (5 %), 128K",
    "engine_sparse": "decode throughput, sparse (10 %), 1K to 32K",
}
"""In the order in which they run."""
CORRECTNESS = ("kernels", "tokens", "graphs", "small_memcheck", "small_racecheck")
DRY = "none (dry run)"


def read_results(folder: Path) -> dict[str, dict[str, Any]]:
    """The stages' files by name."""
    return {
        name: json.loads((folder / f"{name}.json").read_text())
        for name in STAGES
        if (folder / f"{name}.json").exists()
    }


def read_statuses(folder: Path) -> dict[str, dict[str, Any]]:
    """How each stage ended, by name: `status`, `seconds`, and the last words of its log."""
    found = {}
    for name in STAGES:
        file, log = folder / f"{name}.status", folder / f"{name}.log"
        if file.exists():
            status, seconds = file.read_text().split()[:2]
            lines = log.read_text(errors="replace").splitlines() if log.exists() else []
            words = [line.strip() for line in lines if line.strip()][-3:]
            found[name] = {"status": int(status), "seconds": int(seconds), "last_words": words}
    return found


def combined(folder: Path) -> dict[str, Any]:
    """Everything that the JSON file holds."""
    results, statuses = read_results(folder), read_statuses(folder)
    is_dry = any(result.get("gpu") == DRY for result in results.values())
    bars = [] if is_dry else all_bars(results)
    return {
        "is_dry": is_dry,
        "stages": {name: statuses.get(name) for name in STAGES},
        "bars": [asdict(bar) | {"verdict": bar.verdict} for bar in bars],
        "engine": [asdict(row) | {"speed_up": row.speed_up} for row in engine_rows(results)],
        "results": results,
    }


def markdown(content: Mapping[str, Any]) -> str:
    """The report for a person.

    Args:
        content: Of the JSON file.
    """
    results: Results = content["results"]
    parts = [
        ["# GPU check"],
        _machine(results),
        _stages(content),
        _bars(content),
        _kernels(results),
        *(_attention(context) for context in results.get("attention", {}).get("contexts", [])),
        _grid(results),
        _engines(content),
    ]
    return "\n\n".join("\n".join(part) for part in parts if part) + "\n"


def _machine(results: Results) -> list[str]:
    found = results.get("environment")
    if found is None:
        return ["The machine is not known: the stage `environment` did not run."]
    driver = found.get("driver", {})
    packages = ", ".join(f"{name} {number}" for name, number in found["packages"].items())
    clocks = ", ".join(f"{name} {value}" for name, value in driver.items() if name != "name")
    dry = ["", "**A dry run without a GPU: no number below is a measurement.**"]
    return [
        f"{found['gpu']}; CUDA {found['cuda']}, {packages}; {found['processor']}; "
        f"{found['measured']}, commit {found['commit']}",
        *(["", clocks] if clocks else []),
        *(dry if found["gpu"] == DRY else []),
    ]


def _stages(content: Mapping[str, Any]) -> list[str]:
    lines = ["## Stages", "", "| stage | what | result | seconds | measured | commit |"]
    lines.append("|---|---|---|---|---|---|")
    said = []
    for name, what in STAGES.items():
        status, result = content["stages"].get(name), content["results"].get(name, {})
        when, commit = result.get("measured", ""), result.get("commit", "")
        verdict, seconds = "not run", ""
        if status is not None:
            seconds = str(status["seconds"])
            verdict = {0: "passed", SKIPPED: "skipped", 124: "FAILED: out of time"}.get(
                status["status"], f"FAILED ({status['status']})"
            )
            if status["status"] != 0:
                said.append(f"- `{name}`: {' / '.join(status['last_words'])}"[:600])
        lines.append(f"| {name} | {what} | {verdict} | {seconds} | {when} | {commit} |")
    failures = [
        f"- `{name}`: {failure}"
        for name, result in content["results"].items()
        for failure in result.get("failures", [])
    ]
    return [*lines, *([""] if said or failures else []), *said, *failures]


def _bars(content: Mapping[str, Any]) -> list[str]:
    if content["is_dry"]:
        return []
    lines = ["## Bars (for an H200 or better)", "", "| what | wanted | measured | |"]
    lines.append("|---|---|---|---|")
    for given in content["bars"]:
        bar = Bar(**{name: value for name, value in given.items() if name != "verdict"})
        sign = "<=" if bar.at_most else ">="
        wanted = f"{bar.wanted:.0%}" if bar.unit == "%" else f"{bar.wanted:g} x"
        measured = ""
        if bar.measured is not None:
            measured = f"{bar.measured:.1%}" if bar.unit == "%" else f"{bar.measured:.2f} x"
        lines.append(f"| {bar.what} | {sign} {wanted} | {measured} | {bar.verdict} |")
    return lines


def _kernels(results: Results) -> list[str]:
    found = results.get("bandwidth")
    if found is None:
        return []
    lines = [
        f"## Kernels ({found['gpu']})",
        "",
        f"A copy moves {found['copy_bytes_per_second'] / 1e12:.2f} TB/s (read and written). "
        "Bytes are those that a kernel cannot do without.",
        "",
        "| kernel | of | us | quartiles | MB | TB/s | of the copy |",
        "|---|---|---|---|---|---|---|",
    ]
    for record in found["records"]:
        of = [f"{record[name]} {name}" for name in ("bits",) if name in record]
        of += [f"{record['density']:.0%}"] if "density" in record else []
        of += [f"per {record['per']}"] if "per" in record else []
        moved = ["", "", ""]
        if "bytes" in record:
            share = f"{record['share_of_copy']:.1%}"
            moved = [f"{record['bytes'] / 1e6:.1f}", f"{record['bandwidth'] / 1e12:.2f}", share]
        lines.append(
            f"| {record['kernel']} | {', '.join(of)} | {record['microseconds']:.1f} "
            f"| {record['low']:.1f} - {record['high']:.1f} | {' | '.join(moved)} |"
        )
    methods = sorted({record["method"] for record in found["records"]})
    return [*lines, "", f"Measured by: {'; '.join(methods)}."]


def _attention(context: Mapping[str, Any]) -> list[str]:
    dense = ", ".join(
        f"{name} {record['microseconds']:.1f} us" for name, record in context["dense"].items()
    )
    lines = [
        f"## Attention of a decode step: {context['keys']} keys, batch {context['batch']}",
        "",
        f"Dense: {dense}; speed-ups are over {context['fastest_dense']}. "
        f"{context['layers']} layers, one after the other.",
        *(f"- left out: {name}: {why}" for name, why in context["left_out"].items()),
        "",
        "| maskers | us | quartiles | us, launches apart | plan, us per step | read by a head "
        "| loaded | index | speed-up | ceiling |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for record in context["sparse"]:
        if record.get("error"):
            lines.append(f"| {record['name']} | FAILED: {record['error']} | | | | | | | | |")
            continue
        lines.append(
            f"| {record['name']} | {record['microseconds']:.1f} "
            f"| {record['low']:.1f} - {record['high']:.1f} "
            f"| {_shown(record.get('apart_microseconds'), '.1f')} "
            f"| {record['plan_microseconds']:.0f} | {record['density']:.1%} "
            f"| {record['loaded']:.1%} | {record['index_share']:.1%} "
            f"| {record['speed_up']:.2f} x | {record['ceiling']:.1f} x |"
        )
    note = (
        "Loaded: keys and values that are loaded for a group of query heads, of all; a ceiling is "
        "1 / (loaded + index). Launches apart: none begins before the one before it has ended."
    )
    return [*lines, "", note, *_parts(context["sparse"])]


def _shown(value: float | None, form: str, otherwise: str = "") -> str:
    return otherwise if value is None else format(value, form)


def _parts(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the steps of lists are made of."""
    lines = [
        "",
        "Kernels of a layer's step, us by torch's profiler, launches apart, without gaps:",
        "",
    ]
    for record in records:
        if record.get("kernels"):
            times = [f"`{name[:60]}` {time:.1f}" for name, time in record["kernels"].items()]
            lines.append(f"- {record['name']}: {', '.join(times)}")
    return lines if len(lines) > 3 else []


def _grid(results: Results) -> list[str]:
    found = results.get("attention", {}).get("dense_grid", [])
    lines = [
        "## From how many keys on maskers pay: one layer's attention",
        "",
        "| keys | requests | dense, us (formula) | Quest 10 %, us (formula) | speed-up | chosen |",
        "|---|---|---|---|---|---|",
    ]
    costs = _formulas(found)
    for record in found:
        dense, sparse = record.get("microseconds"), record.get("sparse_microseconds")
        keys, rows = record["keys"], record["requests"]
        if costs is None or dense is None or sparse is None:
            lines.append(f"| {keys} | {rows} | {record['left_out']} | | | |")
            continue
        ours, theirs = (
            1e6 * model.seconds(rows, rows * keys) for model in (costs.sparse, costs.dense)
        )
        pays = costs.sparse_pays(StepLoad(rows, rows * keys, rows, rows * keys), False)
        lines.append(
            f"| {keys} | {rows} | {dense:.1f} ({theirs:.1f}) | {sparse:.1f} ({ours:.1f}) "
            f"| {dense / sparse:.2f} x | {'sparse' if pays else 'dense'} |"
        )
    note = (
        "Formula: a constant, so much per request and so much per key, fitted to these cells as "
        'servers fit it when they start (`min_sparse_keys` "auto"); chosen: what they would choose '
        "by it. Theirs is of all layers."
    )
    return [*lines, "", note] if found else []


def _formulas(found: Sequence[Mapping[str, Any]]) -> AttentionCosts | None:
    """Fitted to the cells of which both times are there; None without any."""
    names = ("microseconds", "sparse_microseconds")
    whole = [cell for cell in found if all(cell.get(name) is not None for name in names)]
    if not whole:
        return None
    dense, sparse = (
        CostModel.fit(
            [
                Point(cell["requests"], cell["requests"] * cell["keys"], 1e-6 * cell[name])
                for cell in whole
            ]
        )
        for name in names
    )
    return AttentionCosts(dense, sparse)


def _engines(content: Mapping[str, Any]) -> list[str]:
    names = [name for name in STAGES if name.startswith("engine_")]
    results = {name: content["results"][name] for name in names if name in content["results"]}
    if not results:
        return []
    lines = [
        "## Decode throughput of engines (Llama-3.1-8B's shape, random weights)",
        "",
        "| keys | requests | dense tokens/s | sparse tokens/s | density | a | speed-up | ceiling |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in content["engine"]:
        lines.append(
            f"| {row['keys']} | {row['requests']} | {row['dense']:.1f} | {row['sparse']:.1f} "
            f"| {_shown(row['density'], '.1%', 'dense')} | {_shown(row['share'], '.1%')} "
            f"| {row['speed_up']:.2f} x | {_shown(row['ceiling'], '.2f')} |"
        )
    lines += [
        "",
        f"a: {LAYERS} times a layer's dense attention (measured by itself), of the dense step's "
        "time; ceiling: 1 / ((1 - a) + a (d + index share)), where what is in the brackets was "
        "counted by the engine.",
    ]
    for name, result in results.items():
        lines.append(
            f"- `{name}`: {result['gpu']}, graphs {result['cudagraph_mode']}, "
            f"{result['startup_seconds']:.0f} s to start, {result['capacity_tokens']} tokens fit"
        )
        lines += [
            f"  - {record['keys']} keys x {record['requests']}: {record['left_out']}"
            for record in result["records"]
            if "left_out" in record
        ]
    return lines


def failed_correctness(content: Mapping[str, Any]) -> list[str]:
    """Stages of correctness that ran and did not pass."""
    stages = content["stages"]
    return [
        name
        for name in CORRECTNESS
        if stages.get(name) is not None and stages[name]["status"] not in (0, SKIPPED)
    ]


def main() -> None:
    """Writes both files.

    Raises:
        SystemExit: A correctness stage failed.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True)
    folder = parser.parse_args().output
    content = combined(folder)
    (folder / "gpu_check.json").write_text(json.dumps(content, indent=1) + "\n")
    text = markdown(content)
    (folder / "gpu_check.md").write_text(text)
    print(text)
    failed = failed_correctness(content)
    if failed:
        raise SystemExit(f"correctness failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
