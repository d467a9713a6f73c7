"""Models whose layers are of several kinds on vLLM's CUDA code path, against the CPU's engine.

Recurrent layers beside attention, for which vLLM makes blocks larger (48 tokens here, for them to
be as large as a state); layers with a window beside others whose heads are larger, one of which
reads the keys of another; layers with learned attention sinks, with a window and without; and
plain ones with caches of 8 bits.
"""

import json
from typing import Any

import pytest
from transformers import (
    Gemma4TextConfig,
    GraniteMoeHybridConfig,
    GraniteSWAConfig,
    PretrainedConfig,
)

pytest.importorskip("vllm")

from tests.cpu_features import HAS_EIGHT_BITS, needs_eight_bits
from tests.plugin.cuda.dry_cuda import GRAPHS
from tests.plugin.cuda.run_engines import (
    DRY_OPTIONS,
    OPTIONS,
    SHAPE,
    run_both,
    write_model,
    write_tiny_llama,
)
from tests.plugin.cuda.test_automatic_engines import ALWAYS
from tests.plugin.cuda.test_sparse_engines import (
    OFF,
    QUEST,
    SINK_LOCAL,
    SOCKET,
    SPARSE_PROMPT,
    STATISTICS,
    V1,
    request,
)

RUN = [
    request(0, 40, 8),
    request(1, 5, 9, arrives=1, **OFF),
    request(2, 55, 6, arrives=3),
    request(3, 20, 4, arrives=4, **SPARSE_PROMPT),
    request(2, 55, 4, arrives=12),  # may find a block of the same prompt
]
MASKERS_OF_ITS_OWN = {
    "sparse_attention_config": json.dumps({"maskers": [*SINK_LOCAL, SOCKET]}),
    **SPARSE_PROMPT,
}
RUN_WITH_SOCKET = [*RUN, request(4, 30, 12, arrives=14, **MASKERS_OF_ITS_OWN)]
"""The last request takes the general path."""
CONFIG = {"maskers": [*SINK_LOCAL, QUEST]}


def recurrent() -> PretrainedConfig:
    return GraniteMoeHybridConfig(
        **SHAPE,
        shared_intermediate_size=256,
        num_hidden_layers=2,
        layer_types=["mamba", "attention"],
        position_embedding_type="rope",
        attention_multiplier=32**-0.5,
        mamba_n_heads=8,
        mamba_d_head=32,
        mamba_d_state=16,
        mamba_n_groups=1,
        num_local_experts=0,
        num_experts_per_tok=0,
    )


def windowed() -> PretrainedConfig:
    return Gemma4TextConfig(
        **SHAPE,
        intermediate_size=256,
        num_hidden_layers=3,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
        num_kv_shared_layers=1,  # the last one's keys are the first one's
        sliding_window=16,
        head_dim=32,
        per_layer_config={"0": {"head_dim": 64}, "2": {"head_dim": 64}},
        hidden_size_per_layer_input=16,
        vocab_size_per_layer_input=512,
    )


def with_sinks() -> PretrainedConfig:
    return GraniteSWAConfig(
        **SHAPE,
        intermediate_size=256,
        num_hidden_layers=2,
        layer_types=["full_attention", "sliding_attention"],
        sliding_window=16,
        attention_multiplier=32**-0.5,
    )


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("mixed")
    models = {
        "recurrent": str(write_model(recurrent(), folder / "recurrent")),
        "windowed": str(write_model(windowed(), folder / "windowed")),
        "with sinks": str(write_model(with_sinks(), folder / "sinks")),
    }
    if HAS_EIGHT_BITS:
        models["eight bits"] = str(write_tiny_llama(folder / "llama"))

    def engine(
        model: str, options: dict[str, Any], least: int | str = 0, **others: Any
    ) -> dict[str, Any]:
        is_general = model in ("with sinks", "eight bits")
        # Elsewhere no memory is there but what the server's maskers were found to need.
        config = {**CONFIG, "min_sparse_keys": least, "allow_request_config": is_general}
        own = {
            "model": models[model],
            "attention_backend": "CUSTOM",
            "additional_config": {"sparse_attention": config},
        }
        asked = {"batches": [RUN_WITH_SOCKET if is_general else RUN], "calls": STATISTICS}
        if model == "eight bits":
            own["kv_cache_dtype"] = "fp8"
        return {"options": {**options, **own}, **asked, **others}

    graphs = {**DRY_OPTIONS, "compilation_config": GRAPHS}
    dry = {
        # (The CPU's engine cannot keep recurrent states for prefixes.)
        "recurrent, V2": engine(
            "recurrent", {**graphs, "enable_prefix_caching": True}, "auto", costs=ALWAYS
        ),
        "recurrent, V1": engine("recurrent", graphs, environment=V1),
        "windowed, V2": engine("windowed", graphs),
        "with sinks, V2": engine("with sinks", graphs),
    }
    if HAS_EIGHT_BITS:
        dry["eight bits, V2"] = engine("eight bits", graphs)
    cpu, found = run_both({model: engine(model, OPTIONS) for model in models}, dry, folder)
    return cpu | found


@pytest.mark.parametrize(
    "name",
    [
        *("recurrent, V2", "recurrent, V1", "windowed, V2", "with sinks, V2"),
        pytest.param("eight bits, V2", marks=needs_eight_bits),
    ],
)
def test_each_row_has_its_own_maskers(reports: dict[str, dict[str, Any]], name: str) -> None:
    found, expected = reports[name], reports[name.partition(",")[0]]
    assert found["platform"] == "DryCudaPlatform"
    assert found["tokens"] == expected["tokens"]
    [counts], [right] = found["calls"][-1], expected["calls"][-1]
    has_prefixes = name == "recurrent, V2"
    assert found["prefix_hits"] == (48 if has_prefixes else 0)
    # What is found is no query.
    assert counts == {**right, "dense_queries": right["dense_queries"] - found["prefix_hits"]}
    assert counts["sparse_queries"] > 0
    assert (counts["general_rows"] > 0) == (name in ("with sinks, V2", "eight bits, V2"))
    assert counts["density"] < 0.9
    assert found["replays"] > 5
