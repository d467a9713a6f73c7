"""Planners of one engine: of its layers with the same caches, and of larger blocks."""

import gc
import weakref
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.plugin.paged.paged_rows import SINK_LOCAL, shape_of
from vllm_sparse_plugin import compat, device_planners
from vllm_sparse_plugin.paged.learned_index import LearnedIndex
from vllm_sparse_plugin.serving_config import ServingConfig


class Engine:
    """What planners look at of an engine's configuration."""

    def __init__(self, **changed: Any) -> None:
        self.speculative_config = changed.get("speculative_config")
        self.scheduler_config = SimpleNamespace(max_num_seqs=4, max_num_batched_tokens=16)
        self.model_config = SimpleNamespace(max_model_len=60)
        layers = changed.get("layers", ())
        self.layers = {f"layers.{index}.attn": layer for index, layer in enumerate(layers)}


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    found = {"maskers": SINK_LOCAL}
    monkeypatch.setattr(compat, "serving_config", lambda engine: ServingConfig.parse(found))
    monkeypatch.setattr(compat, "implementations", lambda engine: engine.layers)
    monkeypatch.setattr(compat, "device_type", lambda: "cpu")
    return found


def test_layers_of_larger_blocks_select_in_the_memory_of_the_others(config: dict) -> None:
    """vLLM enlarges blocks after it has looked how much memory an engine takes."""
    engine, shape = Engine(), shape_of()
    planner = device_planners.planner_of(engine, shape)
    assert device_planners.planner_of(engine, replace(shape)) is planner
    larger = device_planners.planner_of(engine, replace(shape, block_size=4 * shape.block_size))
    assert larger is not planner
    assert larger.layout.shape.block_size == 4 * shape.block_size
    assert larger.memory is planner.memory
    # Heads of another size want as much memory as they want, which a profile sees.
    other = device_planners.planner_of(engine, replace(shape, head_size=2 * shape.head_size))
    assert other.memory is not planner.memory
    assert device_planners.planner_of(Engine(), shape).memory is not planner.memory


def test_a_planner_lives_as_long_as_its_engine(config: dict) -> None:
    engine = Engine()
    planner = weakref.ref(device_planners.planner_of(engine, shape_of()))
    assert planner() is not None
    del engine
    gc.collect()
    assert planner() is None


@pytest.mark.parametrize("allow", [True, False])
@pytest.mark.parametrize("fast_path", [True, False])
@pytest.mark.parametrize("is_speculative", [True, False])
def test_what_an_engine_makes_of_its_configuration(
    config: dict, allow: bool, fast_path: bool, is_speculative: bool
) -> None:
    config |= {"allow_request_config": allow, "fast_path": fast_path}
    engine = Engine(speculative_config=object() if is_speculative else None)
    planner = device_planners.planner_of(engine, shape_of())
    assert planner.limits.brings_maskers == (allow and not is_speculative)
    assert planner.limits.has_fast_path == (fast_path and not is_speculative)
    assert planner.limits.capacity == 64
    assert planner.device == torch.device("cpu")
    assert (planner.memory.num_bytes > 0) == planner.limits.has_fast_path


def test_what_is_learned_is_kept_of_layers_with_an_index(
    config: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows, and recurrent layers of hybrid models, take nothing of that memory."""
    pq = {"type": "pq_cache", "heavy_size": 4, "pq_sub_dim": 8, "pq_bits": 2}
    config["maskers"] = [*SINK_LOCAL, pq]
    (index,) = device_planners.planner_of(Engine(), shape_of()).layout.indices
    assert isinstance(index, LearnedIndex)
    state = 4 * index.state_width(shape_of())
    monkeypatch.setattr(device_planners, "STATES_BYTES", 2 * state)

    def sequences(*layers: object) -> int:
        planner = device_planners.planner_of(Engine(layers=layers), shape_of())
        return planner.limits.max_sequences

    own = SimpleNamespace(has_index=True)
    assert sequences(own) == 2
    assert sequences(own, SimpleNamespace(has_index=False), object()) == 2
    assert sequences(own, own) == 1
    assert sequences() == 2  # the model is not there yet
