"""The metric logger, and what research attention logs."""

import io
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from sparse_attention_hub import MicroMetricLogger
from sparse_attention_hub.metric_logging import logger as metric_log
from sparse_attention_hub.sparse_attention import (
    LocalMaskerConfig,
    ResearchAttention,
    ResearchAttentionConfig,
    SinkMaskerConfig,
)
from tests.hub.brute_force import additive, causal
from tests.hub.top_k_maskers import tensors

DENSITY, ERROR = "research_attention_density", "research_attention_output_error"


@pytest.fixture(autouse=True)
def fresh():
    MicroMetricLogger._instance = None
    yield
    MicroMetricLogger._instance = None


def events(folder) -> list[dict]:
    MicroMetricLogger().flush()
    path = folder / "micro_metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def attend(config=None, **kwargs):
    config = config or ResearchAttentionConfig([SinkMaskerConfig(2), LocalMaskerConfig(3)])
    query, key, value = tensors(1, 4, 2, 4, 20)
    mask = additive(causal(1, 4, 20))
    attention = ResearchAttention.create_from_config(config)
    return attention.custom_attention(None, query, key, value, mask, 0.25, 0.0, {}, **kwargs)


def test_density_and_error_of_each_call(tmp_path) -> None:
    MicroMetricLogger().configure_logging(str(tmp_path), enabled_metrics="all")
    attend(layer_idx=3)
    attend(ResearchAttentionConfig([]))  # dense; and no layer_idx is no error
    found = events(tmp_path)
    assert [event["metric"] for event in found] == [DENSITY, ERROR] * 2
    assert found[0]["value"] == pytest.approx(4 * 5 / (17 + 18 + 19 + 20))
    assert found[0]["metadata"] == {"layer_idx": 3}
    assert "log_metrics" in found[0]["location"]
    assert 0 < found[1]["value"] < 10
    assert [event["value"] for event in found[2:]] == [1.0, pytest.approx(0.0, abs=1e-6)]


def test_learned_sinks_are_in_what_it_is_compared_with(tmp_path) -> None:
    MicroMetricLogger().configure_logging(str(tmp_path), enabled_metrics=[ERROR])
    attend(ResearchAttentionConfig([]), s_aux=torch.ones(4))
    [found] = events(tmp_path)
    assert found["value"] == pytest.approx(0.0, abs=1e-6)


def test_off_measures_nothing(monkeypatch) -> None:
    def measured(*args, **kwargs):
        raise AssertionError

    home = "sparse_attention_hub.sparse_attention.research_attention.base"
    monkeypatch.setattr(f"{home}.get_true_attention_output", measured)
    monkeypatch.setattr(f"{home}.count_read_keys", measured)
    attend(layer_idx=0)


def test_one_logger_per_process(tmp_path, caplog) -> None:
    first = MicroMetricLogger(str(tmp_path), flush_every=2)
    assert MicroMetricLogger("elsewhere") is first
    assert first.log_path == str(tmp_path)
    assert "already" in caplog.text
    assert first.flush_every == 2


def test_only_enabled_and_registered_metrics(tmp_path, caplog) -> None:
    MicroMetricLogger.register_metric("test_metric", int)
    metrics = MicroMetricLogger()
    metrics.log("test_metric", 1)  # no place to log to: nothing
    assert not metrics.is_logging_configured()
    metrics.configure_logging(str(tmp_path), ["test_metric", "no_such_metric"])
    assert "no_such_metric" in caplog.text
    assert metrics.get_enabled_metrics() == {"test_metric"}
    assert metrics.is_metric_enabled("test_metric")
    metrics.log(DENSITY, 0.5)
    metrics.log("test_metric", 7, {"a": 1})
    assert [(e["metric"], e["value"], e["metadata"]) for e in events(tmp_path)] == [
        ("test_metric", 7, {"a": 1})
    ]
    metrics.enable_metrics(None)
    assert not metrics.is_metric_enabled("test_metric")
    assert MicroMetricLogger.get_registered_metrics()["test_metric"] is int


def test_limits_and_flushing(tmp_path) -> None:
    metrics = MicroMetricLogger(str(tmp_path), flush_every=3, enabled_metrics=[DENSITY])
    for value in range(3):
        metrics.log(DENSITY, value)
    assert len((tmp_path / "micro_metrics.jsonl").read_text().splitlines()) == 3
    metrics.configure_logging(str(tmp_path), [DENSITY], max_records=2)
    assert metrics.get_records_remaining() == 2
    for value in range(5):
        metrics.log(DENSITY, value)
    assert metrics.is_max_records_reached()
    assert metrics.get_total_records_logged() == 2
    assert len(events(tmp_path)) == 5
    metrics.configure_logging(str(tmp_path), [DENSITY], sampling_factor=-3)
    metrics.log(DENSITY, 1)
    assert metrics.get_sampling_factor() == 0.0
    assert len(events(tmp_path)) == 5


def test_an_old_queue_is_written_at_the_next_event(tmp_path) -> None:
    metrics = MicroMetricLogger(str(tmp_path), flush_interval=0.0, enabled_metrics=[DENSITY])
    metrics.log(DENSITY, 1)
    assert (tmp_path / "micro_metrics.jsonl").exists()


def test_what_json_cannot_hold_is_refused_and_nothing_is_lost(tmp_path) -> None:
    metrics = MicroMetricLogger(str(tmp_path), enabled_metrics=[DENSITY])
    metrics.log(DENSITY, 1)
    with pytest.raises(TypeError):
        metrics.log(DENSITY, torch.ones(1))
    assert [event["value"] for event in events(tmp_path)] == [1]


def test_threads_lose_nothing(tmp_path) -> None:
    metrics = MicroMetricLogger(str(tmp_path), flush_every=7, enabled_metrics=[DENSITY])

    def work() -> None:
        for value in range(200):
            metrics.log(DENSITY, value)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(events(tmp_path)) == 800


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {"a": [1.0, float("-inf")]}])
def test_numbers_that_json_has_not_are_null(tmp_path, value: object) -> None:
    metrics = MicroMetricLogger()
    metrics.configure_logging(str(tmp_path), enabled_metrics="all")
    metrics.log(DENSITY, value)
    metrics.flush()
    text = (tmp_path / "micro_metrics.jsonl").read_text()
    found = json.loads(text, parse_constant=lambda name: pytest.fail(name))["value"]
    assert found == ({"a": [1.0, None]} if isinstance(value, dict) else None)


def test_what_cannot_be_written_is_written_later(tmp_path, caplog) -> None:
    folder = tmp_path / "log"
    metrics = MicroMetricLogger()
    metrics.configure_logging(str(folder), enabled_metrics="all")
    folder.rmdir()
    metrics.log(DENSITY, 0.5)
    metrics.flush()
    assert "1 metrics are not written yet" in caplog.text
    folder.mkdir()
    assert [event["value"] for event in events(folder)] == [0.5]


def test_a_write_that_fails_half_way_leaves_nothing(tmp_path, monkeypatch) -> None:
    """So that no line is there twice when it is written again."""
    metrics = MicroMetricLogger()
    metrics.configure_logging(str(tmp_path), enabled_metrics="all")
    metrics.log(DENSITY, 0.25)
    metrics.flush()
    before = (tmp_path / "micro_metrics.jsonl").read_bytes()
    metrics.log(DENSITY, 0.5)

    class FullDisk(io.FileIO):
        """Takes seven bytes more."""

        def write(self, content: Any) -> int:
            if self.tell() > len(before):
                raise OSError("no space left")
            return super().write(content[:7])

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda path, mode, buffering: FullDisk(path, mode))
        metrics.flush()
    assert (tmp_path / "micro_metrics.jsonl").read_bytes() == before
    assert [event["value"] for event in events(tmp_path)] == [0.25, 0.5]


def test_what_waits_for_a_file_has_a_limit_and_stays_with_it(tmp_path, monkeypatch, caplog) -> None:
    monkeypatch.setattr(metric_log, "_MOST_QUEUED", 3)
    folder = tmp_path / "log"
    metrics = MicroMetricLogger(flush_every=1)
    metrics.configure_logging(str(folder), enabled_metrics="all")
    folder.rmdir()
    for value in range(5):
        metrics.log(DENSITY, value)
    assert "1 metrics are lost" in caplog.text
    with pytest.raises(ValueError, match="max_records"):
        metrics.configure_logging(str(tmp_path / "other"), max_records=-1)
    assert len(metrics._queue) == 3
    metrics.configure_logging(str(tmp_path / "other"), enabled_metrics="all")
    assert f"3 metrics of {folder} are lost" in caplog.text
    metrics.log(DENSITY, 9)
    assert [event["value"] for event in events(tmp_path / "other")] == [9]


def test_limits_are_the_same_in_the_constructor(tmp_path) -> None:
    with pytest.raises(ValueError, match="max_records must be >= 0 or None, got -3"):
        MicroMetricLogger(max_records=-3)
    metrics = MicroMetricLogger(sampling_factor=5.0)
    assert metrics.get_sampling_factor() == 1.0
    with pytest.raises(ValueError, match="max_records"):
        metrics.configure_logging(str(tmp_path), max_records=-1)
