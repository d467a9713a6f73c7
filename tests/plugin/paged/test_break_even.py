"""From how many keys on maskers run: measured, kept, and counted where it keeps a query dense."""

import json

import numba
import pytest
import torch

from sparse_attention_hub.sparse_attention.serialization import config_from_dict
from tests.hub.test_imports import modules_after
from tests.plugin.paged.paged_rows import SINK_LOCAL
from vllm_sparse_plugin.paged import break_even
from vllm_sparse_plugin.paged.break_even import NEVER
from vllm_sparse_plugin.paged.measure_break_even import crossing
from vllm_sparse_plugin.request_parameters import RequestParameters, resolve_request
from vllm_sparse_plugin.row_table import Row
from vllm_sparse_plugin.serving_config import ServingConfig
from vllm_sparse_plugin.step_plan import split_rows
from vllm_sparse_plugin.trial import AttentionShape


@pytest.mark.parametrize(
    ("dense", "sparse", "expected"),
    [
        ((1.0, 16.0), (2.0, 2.0), 1024),  # 1 + k/512 against 2, from 512 on
        ((1.0, 16.0), (1.0, 2.0), 512),
        ((1.0, 16.0), (0.5, 1.0), 248),
        ((16.0, 16.0 * 16), (0.1, 0.2), 2),
        ((1.0, 2.0), (1.5, 3.0), NEVER),
        ((1.0, 2.0), (0.5, 3.0), 0),
    ],
)
def test_where_costs_cross(dense, sparse, expected) -> None:
    assert crossing(dense, sparse) == pytest.approx(expected, abs=1)


def break_even_of(maskers: list[dict]) -> int:
    shape = AttentionShape(num_layers=2, num_heads=8, num_kv_heads=2, head_size=32)
    config = config_from_dict({"maskers": maskers})
    return break_even.break_even_of(config, shape, 32, torch.float32)


def test_measured_once_and_kept(monkeypatch: pytest.MonkeyPatch, tmp_path, caplog) -> None:
    # Kernels that are compiled already serve the measuring process too.
    monkeypatch.setenv("NUMBA_CACHE_DIR", numba.config.CACHE_DIR)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    keys = break_even_of(SINK_LOCAL)
    assert 0 <= keys <= NEVER
    (kept,) = (tmp_path / "vllm_sparse_plugin").glob("break_even_*.json")
    assert json.loads(kept.read_text())["keys"] == keys
    # The general path has none.
    socket = {"type": "socket", "heavy_size": 8, "K": 3, "L": 10}
    assert break_even_of([socket]) == 0
    monkeypatch.setattr(break_even.sys, "executable", "/bin/false")
    assert break_even_of(SINK_LOCAL) == keys  # not measured again
    assert break_even_of(SINK_LOCAL[:1]) == 0
    assert "break-even not measured" in caplog.text


def test_measuring_does_not_wait_for_vllm() -> None:
    """Which takes ten seconds to import."""
    loaded = modules_after("import vllm_sparse_plugin.paged.measure_break_even")
    assert not loaded & {"vllm", "transformers"}


OWN = '{"maskers": [{"type": "sink", "sink_size": 2}]}'


@pytest.mark.parametrize(
    ("server", "request_", "expected"),
    [
        ("auto", {}, 500),  # what was measured for the server's maskers
        ("auto", {"sparse_attention_config": OWN}, 0),
        ("auto", {"sparse_attention_min_keys": 9}, 9),
        (30, {}, 30),
        (30, {"sparse_attention_config": OWN}, 30),
        (30, {"sparse_attention_min_keys": 0}, 0),
    ],
)
def test_who_decides(server, request_, expected: int) -> None:
    config = ServingConfig(config_from_dict({"maskers": SINK_LOCAL}), min_sparse_keys=server)
    resolved = resolve_request(request_, config, break_even=500)
    assert resolved["sparse_attention_resolved"].min_sparse_keys == expected
    for steps_decide in (False, True):
        resolved = resolve_request(request_, config, 500, steps_decide)
        # Who gives a number, or maskers of their own, has decided.
        is_automatic = steps_decide and server == "auto" and not request_
        assert resolved["sparse_attention_resolved"].is_automatic is is_automatic


def test_a_query_with_fewer_keys_is_dense_and_one_with_as_many_is_not() -> None:
    parameters = RequestParameters("c", "f", dense_prefix=3, tag=None, min_sparse_keys=10)
    row = Row(parameters, parameters.dense_prefix_tokens(5), parameters.asked_prefix_tokens(5))
    assert row.asked_prefix_tokens == 3
    for seq_len, is_sparse in ((9, False), (10, True)):
        dense, sparse = split_rows([0, 1], [seq_len], {0: row})
        assert (len(dense), len(sparse)) == (1 - is_sparse, int(is_sparse))


def test_bad_values() -> None:
    config = config_from_dict({"maskers": SINK_LOCAL})
    for value in (-1, True, "often", 1.5):
        with pytest.raises(ValueError, match="min_sparse_keys must be an integer >= 0 or"):
            ServingConfig(config, min_sparse_keys=value)
    with pytest.raises(ValueError, match=r"sparse_attention_min_keys must be an integer >= 0"):
        resolve_request({"sparse_attention_min_keys": "7"}, ServingConfig(config))
