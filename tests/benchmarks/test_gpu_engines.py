"""Which cells each engine measures, and when it begins no new one."""

from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.gpu import engine_throughput
from benchmarks.gpu.cells import EVERY, LONG, LONGEST, SHORT
from benchmarks.gpu.engine_throughput import ENGINES, dry_run, gpu_run, measure, seconds_to_begin
from benchmarks.gpu.report import STAGES


def test_what_each_engine_measures() -> None:
    runs = {name: gpu_run(name, False) for name in ENGINES}
    assert {name: run.cells for name, run in runs.items()} == {
        "dense": EVERY,
        "sparse-long": LONG,
        "sparse": SHORT,
    }
    assert [name for name in STAGES if name.startswith("engine_")] == [
        f"engine_{name}" for name in ENGINES
    ]
    assert [run.density for run in runs.values() if run.is_sparse] == [0.05, 0.1]
    assert runs["dense"].options["max_model_len"] == LONGEST + 1024
    for is_quick in (False, True):
        dense, *sparse = (gpu_run(name, is_quick) for name in ENGINES)
        assert sorted(dense.cells) == sorted(cell for run in sparse for cell in run.cells)
        for run in (dense, *sparse):
            sizes = run.options["compilation_config"]["cudagraph_capture_sizes"]
            assert {cell.requests for cell in run.cells} <= set(sizes)  # no row is padding


@pytest.mark.parametrize(
    ("limit", "wanted"), [(None, 420), ("", 420), ("580", 420), ("300", 260), ("30", 0)]
)
def test_no_cell_is_begun_shortly_before_the_limit(
    limit: str | None, wanted: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    if limit is None:
        monkeypatch.delenv("STAGE_SECONDS", raising=False)
    else:
        monkeypatch.setenv("STAGE_SECONDS", limit)
    assert seconds_to_begin(gpu_run("dense", False)) == wanted


class FakeDecoder:
    """Takes 100 seconds for each cell, of a clock that is turned by hand."""

    now = 0.0

    def __init__(self, *_: Any) -> None:
        pass

    def capacity(self) -> None:
        return None

    def measure(self, cell: Any) -> dict[str, Any]:
        FakeDecoder.now += 100
        return {"keys": cell.keys, "requests": cell.requests, "tokens_per_second": 1.0}


def test_what_there_is_no_time_for_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    compilation = SimpleNamespace(cudagraph_mode="NONE")
    config = SimpleNamespace(compilation_config=compilation)
    engine = SimpleNamespace(llm_engine=SimpleNamespace(vllm_config=config))
    monkeypatch.setattr(engine_throughput, "start", lambda *_: engine)
    monkeypatch.setattr(engine_throughput, "Decoder", FakeDecoder)
    clock = SimpleNamespace(perf_counter=lambda: FakeDecoder.now)
    monkeypatch.setattr(engine_throughput, "time", clock)
    monkeypatch.setattr(FakeDecoder, "now", 0.0)
    monkeypatch.setenv("STAGE_SECONDS", "90")
    found = measure(dry_run("dense"), "cpu")
    places = [(record["keys"], record["requests"]) for record in found["records"]]
    assert places == [(512, 1), (512, 4), (128, 4)]
    reasons = [record.get("left_out") for record in found["records"]]
    assert reasons == [None, "50 seconds were over", "50 seconds were over"]
