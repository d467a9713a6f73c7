"""The report of made-up results: bars that are met and missed, stages that did not run."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.gpu.bars import all_bars, engine_rows
from benchmarks.gpu.cells import EVERY
from benchmarks.gpu.kernel_times import per_launch
from benchmarks.gpu.report import STAGES, combined, failed_correctness, markdown
from benchmarks.gpu.sparse_configs import QUEST_5
from tests.benchmarks.gpu_results import all_results


def write(folder: Path, results: dict[str, Any], statuses: dict[str, str]) -> None:
    for name, found in results.items():
        (folder / f"{name}.json").write_text(json.dumps(found))
    for name, status in statuses.items():
        (folder / f"{name}.status").write_text(status)


def verdicts(results: dict[str, Any]) -> dict[str, str]:
    return {bar.what: bar.verdict for bar in all_bars(results)}


def one(found: dict[str, str], *words: str) -> str:
    [verdict] = [value for name, value in found.items() if all(word in name for word in words)]
    return verdict


def test_bars_met_and_missed() -> None:
    found = verdicts(all_results())
    assert one(found, "page gather") == "met"
    assert one(found, "token gather") == "MISSED"
    assert one(found, "index scan", "4 bits") == "met"
    assert one(found, "score and top-k", "5 %") == "met"  # (12 - 2) / 50
    assert (
        one(found, "index update", "4 bits") == "met"
    )  # 35 us of about 5 ms: 0.5 us a layer, and 1.5 us in 4 of 10 steps
    assert one(found, "attention of a decode step", "5 %", "32K") == "met"
    assert one(found, "attention of a decode step", "Quest", "10 %", "32K") == "MISSED"
    assert one(found, "attention of a decode step", "Double Sparsity", "128K") == "MISSED"
    assert one(found, "decode throughput", "32K, batch 16") == "met"
    assert one(found, "decode throughput", "128K, batch 6") == "MISSED"
    assert one(found, "lowest of") == "met"


def test_what_was_not_measured_is_no_bar_that_is_met() -> None:
    assert set(verdicts({}).values()) == {"not measured"}
    without_engines = {n: r for n, r in all_results().items() if not n.startswith("engine")}
    found = verdicts(without_engines)
    assert one(found, "index update", "4 bits") == "met"  # of an estimated step
    assert one(found, "lowest of") == "not measured"


def test_ceilings_of_engines() -> None:
    rows = {(row.keys, row.requests): row for row in engine_rows(all_results())}
    row = rows[32768, 16]
    attention = 32e-6 * 32768 * 16
    assert row.share == pytest.approx(attention / (5 + attention))
    assert row.ceiling == pytest.approx(1 / (1 - row.share + row.share * 0.12))
    assert row.density == 0.1
    assert rows[1024, 1].density is None
    assert rows[1024, 1].ceiling == pytest.approx(1)
    assert rows[1024, 64].speed_up == pytest.approx(0.99)


def test_both_sparse_engines_are_compared_with_the_one_dense_engine() -> None:
    results = all_results()
    rows = engine_rows(results)
    assert [(row.keys, row.requests) for row in rows] == [(c.keys, c.requests) for c in EVERY]
    speed_ups = [row.speed_up for row in rows if row.keys == 131072]
    assert speed_ups == pytest.approx([3.0] * 3)
    # As on a GPU whose memory is too small for it.
    results["engine_dense"]["records"][-1] = {"keys": 131072, "requests": 6, "left_out": "no"}
    assert [row.requests for row in engine_rows(results) if row.keys == 131072] == [1, 4]
    assert one(verdicts(results), "decode throughput", "128K, batch 4") == "MISSED"


def test_markdown_of_everything(tmp_path: Path) -> None:
    write(tmp_path, all_results(), {"kernels": "0 12", "tokens": "1 3", "graphs": "77 1"})
    (tmp_path / "tokens.log").write_text("one\nthe last words\n")
    content = combined(tmp_path)
    text = markdown(content)
    for part in ("Some GPU", "MISSED", "| kernels |", "FAILED (1)", "the last words", "skipped"):
        assert part in text
    assert "one that fails | FAILED: ValueError: no" in text
    assert "left out: FLASHINFER: not installed" in text
    assert f"- {QUEST_5}: `_attend_kernel` 31.2, `_join_kernel` 4.0" in text
    # Cells whose times are those of a formula: 1 us per 1000 keys, and 20 us.
    assert "| 32768 | 16 | 524.3 (524.3) | 20.0 (20.0) | 26.21 x | sparse |" in text
    assert "| 1024 | 1 | 1.0 (1.0) | 20.0 (20.0) | 0.05 x | dense |" in text
    assert failed_correctness(content) == ["tokens"]
    assert json.loads(json.dumps(content))["bars"]


def test_of_nothing(tmp_path: Path) -> None:
    content = combined(tmp_path)
    text = markdown(content)
    assert text.count("| not run |") == len(STAGES)
    assert " met " not in text
    assert failed_correctness(content) == []


def test_a_dry_run_meets_no_bar(tmp_path: Path) -> None:
    results = all_results()
    results["bandwidth"]["gpu"] = "none (dry run)"
    write(tmp_path, results, {})
    assert combined(tmp_path)["bars"] == []


def test_kernels_are_summed_by_name_and_shared_by_launches() -> None:
    events = [
        SimpleNamespace(key="short", self_device_time_total=4.0),
        SimpleNamespace(key="long", self_device_time_total=6.0),
        SimpleNamespace(key="short", self_device_time_total=1.0),
        SimpleNamespace(key="on the host", self_device_time_total=0.0),
    ]
    assert list(per_launch(events, 2).items()) == [("long", 3.0), ("short", 2.5)]
