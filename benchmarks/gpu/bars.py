"""What is wanted on an H200 or better, and what was measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.gpu.byte_counts import ceiling
from benchmarks.gpu.cells import LAYERS, LONGEST, WEIGHT_BYTES
from benchmarks.gpu.sparse_configs import PAGE_SIZE, QUEST_5, QUEST_10, TOKENS_10

Results = Mapping[str, Mapping[str, Any]]
"""The stages' files by name; those that did not run are not in it."""
KEYS, DENSITY, REQUESTS = 32768, 0.1, 8
_QUEST = {0.05: QUEST_5, 0.1: QUEST_10}
GATHERS = {"page gather": 0.85, "token gather": 0.65}
SCAN, SELECTION, UPDATE = 0.8, 0.25, 0.01
NEVER_BELOW = 0.98
ENGINE_BARS = {(KEYS, 16): 2.5, (LONGEST, None): 3.4}
"""By keys and requests; None: as many as were measured."""


@dataclass(frozen=True)
class Bar:
    """One of them.

    Attributes:
        what: In words.
        wanted: The number.
        measured: The number; None: not measured.
        at_most: Whether the measured one may not be above it, instead of not below.
        unit: "x" or "%".
    """

    what: str
    wanted: float
    measured: float | None
    at_most: bool = False
    unit: str = "x"

    @property
    def verdict(self) -> str:
        """For tables."""
        if self.measured is None:
            return "not measured"
        is_met = self.measured <= self.wanted if self.at_most else self.measured >= self.wanted
        return "met" if is_met else "MISSED"


def all_bars(results: Results) -> list[Bar]:
    """In the order of the report."""
    return [*_kernel_bars(results), *_attention_bars(results), *_engine_bars(results)]


def _found(records: list[dict[str, Any]], **wanted: Any) -> dict[str, Any] | None:
    """The first record with some values."""
    for record in records:
        if all(record.get(name) == value for name, value in wanted.items()):
            return record
    return None


def _kernel_bars(results: Results) -> Iterator[Bar]:
    records = list(results.get("bandwidth", {}).get("records", []))
    place = "batch 8, 32K, head size 128, bfloat16"
    for name, wanted in GATHERS.items():
        record = _found(records, kernel=name, density=DENSITY)
        share = None if record is None else record.get("share_of_copy")
        yield Bar(f"{name} of 10 %, of copy bandwidth; {place}", wanted, share, unit="%")
    for bits in (4, 16):
        record = _found(records, kernel="index scan", bits=bits)
        share = None if record is None else record.get("share_of_copy")
        yield Bar(f"index scan, {bits} bits, of copy bandwidth; {place}", SCAN, share, unit="%")
    for density, name in _QUEST.items():
        share = selection_share(results, density)
        what = f"score and top-k, of the attention of {name}; batch 8, 32K"
        yield Bar(what, SELECTION, share, at_most=True, unit="%")
    for bits in (4, 16):
        what = f"index update, {bits} bits, of a decode step; batch 8, 32K"
        yield Bar(what, UPDATE, update_share(results, bits), at_most=True, unit="%")


def attention_record(results: Results, keys: int, name: str) -> dict[str, Any] | None:
    """A sparse list's record of the attention stage; None without one."""
    for context in results.get("attention", {}).get("contexts", []):
        if context["keys"] == keys:
            record = _found(context["sparse"], name=name)
            return record if record is not None and "speed_up" in record else None
    return None


def selection_share(results: Results, density: float) -> float | None:
    """Time of scores and top-k pages, of the whole step's attention."""
    records = list(results.get("bandwidth", {}).get("records", []))
    wanted = {"per": "KV head", "density": density, "bits": 4}
    selecting = _found(records, kernel="start, score and select", **wanted)
    starting = _found(records, kernel="start flags", **wanted)
    step = attention_record(results, KEYS, _QUEST[density])
    if selecting is None or starting is None or step is None:
        return None
    took: float = selecting["microseconds"] - starting["microseconds"]
    return took / float(step["attend_microseconds"])


def update_share(results: Results, bits: int) -> float | None:
    """Time of all layers' index updates, of a sparse engine's decode step.

    Some steps end a page, and a step takes as long as if all its pages did: the mean over steps of
    requests each of which ends its pages whenever it does.

    Where the engine was not measured, the step is the weights' bytes at the bandwidth of a copy,
    and the layers' attention: less than a real step, so that the share is not too small.
    """
    bandwidth = results.get("bandwidth", {})
    records = list(bandwidth.get("records", []))
    plain = _found(records, kernel="write", bits=bits)
    inside = _found(records, kernel="write and update", bits=bits)
    ending = _found(records, kernel="write and update, pages end", bits=bits)
    if plain is None or inside is None or ending is None:
        return None
    longer = (1 - (1 - 1 / PAGE_SIZE) ** REQUESTS) * (
        ending["microseconds"] - inside["microseconds"]
    )
    took = inside["microseconds"] - plain["microseconds"] + longer
    update: float = 1e-6 * LAYERS * took
    engine = _found(
        list(results.get("engine_sparse", {}).get("records", [])), keys=KEYS, requests=REQUESTS
    )
    if engine is not None and "step_milliseconds" in engine:
        return update / (1e-3 * float(engine["step_milliseconds"]))
    step = attention_record(results, KEYS, _QUEST[DENSITY])
    if step is None:
        return None
    read = WEIGHT_BYTES / float(bandwidth["copy_bytes_per_second"])
    return update / (read + 1e-6 * LAYERS * float(step["microseconds"]))


def _attention_bars(results: Results) -> Iterator[Bar]:
    wanted = {
        _QUEST[0.05]: {KEYS: 4.0, LONGEST: 8.0},
        _QUEST[0.1]: {KEYS: 3.0, LONGEST: 5.5},
        TOKENS_10: {KEYS: 2.5, LONGEST: 4.5},
    }
    for name, by_keys in wanted.items():
        for keys, bar in by_keys.items():
            record = attention_record(results, keys, name)
            what = f"attention of a decode step over dense: {name}, batch 8, {keys // 1024}K"
            yield Bar(what, bar, None if record is None else record["speed_up"])


@dataclass(frozen=True)
class EngineRow:
    """A cell of a sparse engine and of the dense one.

    Attributes:
        keys: Of each prompt.
        requests: At once.
        dense: Tokens per second.
        sparse: Tokens per second.
        density: Of the keys that sparse queries read; None where all were dense.
        share: Of the dense step's time, in which it reads keys and values (a); None: not known.
        ceiling: See `byte_counts.ceiling`; None: not known.
    """

    keys: int
    requests: int
    dense: float
    sparse: float
    density: float | None
    share: float | None
    ceiling: float | None

    @property
    def speed_up(self) -> float:
        """Of decoding."""
        return self.sparse / self.dense


def engine_rows(results: Results) -> list[EngineRow]:
    """The cells that a sparse engine and the dense one have."""
    rows = []
    grid = list(results.get("attention", {}).get("dense_grid", []))
    dense = list(results.get("engine_dense", {}).get("records", []))
    for name in ("engine_sparse", "engine_sparse-long"):
        for record in results.get(name, {}).get("records", []):
            place = {"keys": record["keys"], "requests": record["requests"]}
            other = _found(dense, **place)
            if other is None or "left_out" in other or "left_out" in record:
                continue
            counts = record.get("counts") or {}
            is_sparse = bool(counts.get("sparse_queries"))
            attention = _found(grid, **place)
            share = top = None
            if attention is not None and "microseconds" in attention:
                took = LAYERS * float(attention["microseconds"])
                share = min(1.0, took / (1e3 * float(other["step_milliseconds"])))
                loaded = 1.0
                if is_sparse and counts.get("visible_bytes"):
                    loaded = counts["read_bytes"] / counts["visible_bytes"]  # index included
                top = ceiling(share, loaded, 0.0)
            rows.append(
                EngineRow(
                    **place,
                    dense=float(other["tokens_per_second"]),
                    sparse=float(record["tokens_per_second"]),
                    density=counts.get("density") if is_sparse else None,
                    share=share,
                    ceiling=top,
                )
            )
    return sorted(rows, key=lambda row: (row.keys, row.requests))


def _engine_bars(results: Results) -> Iterator[Bar]:
    rows = engine_rows(results)
    for (keys, requests), bar in ENGINE_BARS.items():
        own = [row for row in rows if row.keys == keys and requests in (None, row.requests)]
        row = max(own, key=lambda row: row.requests, default=None)
        at = requests if row is None else row.requests
        density = 5 if keys == LONGEST else 10
        what = f"decode throughput over dense, Quest {density} %, {keys // 1024}K, batch {at}"
        yield Bar(what, bar, None if row is None else row.speed_up)
    lowest = min(rows, key=lambda row: row.speed_up, default=None)
    where = "" if lowest is None else f" ({lowest.keys} keys, batch {lowest.requests})"
    what = f"decode throughput over dense, lowest of {len(rows)} cells of 1K to 128K{where}"
    yield Bar(what, NEVER_BELOW, None if lowest is None else lowest.speed_up)
