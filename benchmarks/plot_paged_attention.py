"""Draws benchmarks/results/paged_attention.json: speed-up against context and against density.

python -m benchmarks.plot_paged_attention
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # files, no window
from matplotlib import pyplot

RESULTS = Path(__file__).parent / "results"


def draw(rows: list[dict[str, Any]], target: Path) -> None:
    """Two panels of the same measurements.

    Args:
        rows: Of the benchmark's file.
        target: PNG file.
    """
    figure, (by_context, by_density) = pyplot.subplots(1, 2, figsize=(13, 5), sharey=True)
    names = list(dict.fromkeys(row["name"] for row in rows))
    # Not what the others are compared with.
    shown = [name for name in names if "stock" not in name and "nothing selected" not in name]
    for name in shown:
        own = [row for row in rows if row["name"] == name]
        lengths = [row["keys"] for row in own]
        ratios = [row["ratio"] for row in own]
        densities = [row["density"] for row in own]
        by_context.plot(lengths, ratios, marker="o", label=name)
        by_density.plot(densities, ratios, marker="o", linestyle=":", label=name)
    for axes, label in ((by_context, "context (keys)"), (by_density, "density (keys read / keys)")):
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel(label)
        axes.axhline(1, color="grey", linewidth=0.8)
        axes.grid(alpha=0.3)
    by_context.set_ylabel("times as fast as stock vLLM")
    lines, labels = by_context.get_legend_handles_labels()
    figure.legend(lines, labels, loc="lower center", ncols=4, fontsize=9)
    figure.suptitle("Attention of one decode step on two CPU cores")
    figure.tight_layout(rect=(0, 0.12, 1, 1))
    figure.savefig(target, dpi=110)
    pyplot.close(figure)


def main() -> None:
    """Draws the committed results."""
    content = json.loads((RESULTS / "paged_attention.json").read_text())
    draw(content["rows"], RESULTS / "paged_attention.png")


if __name__ == "__main__":
    main()
