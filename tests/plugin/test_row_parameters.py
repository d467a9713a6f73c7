"""The table of rows follows the batch of either model runner."""

import gc
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from transformers import LlamaConfig
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality

from vllm_sparse_plugin import compat
from vllm_sparse_plugin.request_parameters import resolve_request
from vllm_sparse_plugin.row_parameters import RowParametersProcessor
from vllm_sparse_plugin.row_table import row_table
from vllm_sparse_plugin.serving_config import ServingConfig

SERVER = ServingConfig.parse("streaming-llm")


class Shared:
    """Stands for `compilation_config`: the table only needs its identity."""


class Config:
    """Stands for the engine's configuration."""

    def __init__(self) -> None:
        self.compilation_config = Shared()


def parameters(**extra_args: object) -> SamplingParams:
    params = SamplingParams()
    params.extra_args = resolve_request(dict(extra_args), SERVER)
    return params


def update(size: int, added=(), removed=(), moved=()) -> BatchUpdate:
    return BatchUpdate(batch_size=size, added=added, removed=removed, moved=moved)


@pytest.fixture
def engine():
    config = Config()
    return config, RowParametersProcessor(config, "cpu", False), row_table(config).rows


def test_v1_rows_come_go_and_move(engine) -> None:
    _, processor, rows = engine
    prefix = parameters(sparse_attention_dense_prefix=3)
    dense = parameters(sparse_attention="off")
    processor.update_state(
        update(
            3, added=[(0, parameters(), [1] * 10, []), (1, dense, [1], []), (2, prefix, [1], [])]
        )
    )
    assert {row: entry.dense_prefix_tokens for row, entry in rows.items()} == {0: 10, 2: 3}
    processor.update_state(None)
    processor.update_state(
        update(2, removed=[0], moved=[(2, 0, MoveDirectionality.UNIDIRECTIONAL)])
    )
    assert {row: entry.dense_prefix_tokens for row, entry in rows.items()} == {0: 3}
    processor.update_state(update(2, moved=[(0, 1, MoveDirectionality.SWAP)]))
    assert {row: entry.dense_prefix_tokens for row, entry in rows.items()} == {1: 3}
    # A plain dense request takes the row of a sparse one.
    processor.update_state(update(2, added=[(1, dense, [1], [])]))
    assert rows == {}


def test_v2_slot_is_overwritten() -> None:
    config = Config()
    slots = SimpleNamespace(prompt_len=SimpleNamespace(np=np.array([10, 20, 30])))
    processor = RowParametersProcessor(config, slots)
    rows = row_table(config).rows
    assert processor.add_request(1, parameters()) is False
    assert rows[1].dense_prefix_tokens == 20
    processor.add_request(1, parameters(sparse_attention="off"))
    assert rows == {}


def test_logits_are_not_touched(engine) -> None:
    _, processor, _ = engine
    logits = object()
    assert processor.apply(logits) is logits
    assert processor.is_argmax_invariant()


def test_a_table_lives_as_long_as_its_engine() -> None:
    config = Config()
    table = row_table(config)
    assert row_table(config) is table
    assert row_table(Config()) is not table


def test_copies_of_a_configuration_are_one_engine(tmp_path: Path) -> None:
    """vLLM makes them for what is inside a multimodal model, and for drafts."""
    LlamaConfig(num_hidden_layers=1, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    options = EngineArgs(model=str(tmp_path), skip_tokenizer_init=True, max_model_len=64)
    config = options.create_engine_config()
    inner = config.with_hf_config(config.model_config.hf_config)
    assert inner is not config
    assert row_table(inner) is row_table(config)
    engine = compat.engine_of(inner)
    assert compat.engine_of(config) is engine
    assert engine.cache_config is config.cache_config
    assert config.compilation_config is not None
    # Layers may hold it: it does not refer to them.
    assert engine.compilation_config is None
    assert compat.implementations(engine) == {}
    layers = {"attention": SimpleNamespace(impl="its own"), "recurrent": SimpleNamespace()}
    config.compilation_config.static_forward_context.update(layers)
    assert compat.implementations(engine) == {"attention": "its own"}
    gone = weakref.ref(engine)
    del engine, inner, config
    gc.collect()
    assert gone() is None
