"""What `paged_attention` measured, for a person."""

from __future__ import annotations

from dataclasses import dataclass

HOST_KEYS = 16
"""Of the requests that have next to nothing to read: a whole page, whose bounds are made."""
HOST_BUDGET = "0.15 ms, and 25 us for each request of the batch"


@dataclass(frozen=True)
class Row:
    """One configuration at one context length.

    Attributes:
        keys: Context length.
        name: Of the configuration.
        milliseconds: Median of a step.
        ratio: Stock's median / this one.
        bar: Wanted ratio, if there is one.
        density: Keys read / keys visible, over query heads.
        megabytes: That had to be read: keys, values and index.
        bandwidth_share: Of the bandwidth that a plain copy of memory reaches in the same run, reads
            and writes together.
    """

    keys: int
    name: str
    milliseconds: float
    ratio: float
    bar: float | None
    density: float
    megabytes: float
    bandwidth_share: float


def report(rows: list[Row], host: dict[int, float], machine: str) -> str:
    """A Markdown table."""
    lines = [
        machine,
        "",
        "| keys | configuration | ms | times stock | bar | density | MB read | of copy bandwidth |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        bar = (
            "" if row.bar is None else f"{row.bar:g} {'met' if row.ratio >= row.bar else 'MISSED'}"
        )
        lines.append(
            f"| {row.keys} | {row.name} | {row.milliseconds:.2f} | {row.ratio:.2f} | {bar} | "
            f"{row.density:.3f} | {row.megabytes:.1f} | {row.bandwidth_share:.0%} |"
        )
    lines += [
        "",
        f"A layer's step with next to nothing to read, Quest 10 %, requests of {HOST_KEYS} keys: "
        f"planning and index update (budget: {HOST_BUDGET}).",
        "",
    ]
    lines += [f"- {count}: {milliseconds:.2f} ms a layer" for count, milliseconds in host.items()]
    return "\n".join(lines) + "\n"
