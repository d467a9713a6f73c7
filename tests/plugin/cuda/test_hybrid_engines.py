"""A model with recurrent layers on vLLM's CUDA code path, against the CPU's engine.

vLLM makes its blocks larger, 48 tokens here, for them to be as large as a recurrent state.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GraniteMoeHybridConfig

pytest.importorskip("vllm")

from tests.plugin.cuda.dry_cuda import GRAPHS
from tests.plugin.cuda.run_engines import DRY_OPTIONS, OPTIONS, run_both
from tests.plugin.cuda.test_sparse_engines import (
    OFF,
    QUEST,
    SINK_LOCAL,
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
]
CONFIG = {
    "maskers": [*SINK_LOCAL, QUEST],
    "min_sparse_keys": 0,
    "allow_request_config": False,  # no memory is there but what these maskers were found to need
}


def write_tiny_hybrid(folder: Path) -> Path:
    config = GraniteMoeHybridConfig(
        vocab_size=512,
        hidden_size=128,
        shared_intermediate_size=256,
        num_hidden_layers=2,
        layer_types=["mamba", "attention"],
        num_attention_heads=4,
        num_key_value_heads=2,
        position_embedding_type="rope",
        attention_multiplier=32**-0.5,
        mamba_n_heads=8,
        mamba_d_head=32,
        mamba_d_state=16,
        mamba_n_groups=1,
        num_local_experts=0,
        num_experts_per_tok=0,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        initializer_range=0.15,  # see `write_tiny_llama`
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("hybrid")
    own = {
        "model": str(write_tiny_hybrid(folder / "model")),
        "attention_backend": "CUSTOM",
        "additional_config": {"sparse_attention": CONFIG},
    }
    asked = {"batches": [RUN], "calls": STATISTICS}
    graphs = {"options": {**DRY_OPTIONS, **own, "compilation_config": GRAPHS}, **asked}
    dry = {"V2": graphs, "V1": {**graphs, "environment": V1}}
    cpu, found = run_both({"cpu": {"options": {**OPTIONS, **own}, **asked}}, dry, folder)
    return cpu | found


@pytest.mark.parametrize("runner", ["V2", "V1"])
def test_maskers_run_on_pages_of_blocks_that_were_made_larger(
    reports: dict[str, dict[str, Any]], runner: str
) -> None:
    found, expected = reports[runner], reports["cpu"]
    assert found["platform"] == "DryCudaPlatform"
    assert found["tokens"] == expected["tokens"]
    [counts], [right] = found["calls"][-1], expected["calls"][-1]
    assert counts == right
    assert counts["sparse_queries"] > 0
    assert counts["general_rows"] == 0
    assert counts["density"] < 0.9
    assert found["replays"] > 5
