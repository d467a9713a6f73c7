"""Each registered masker, served in a batch with a dense request, gives the reference's tokens."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from examples.documents import python_manual
from sparse_attention_hub import ModelAdapterVLLM, Request
from sparse_attention_hub.sparse_attention.research_attention.maskers.base import MaskerRegistry
from sparse_attention_hub.sparse_attention.serialization import config_from_dict
from tests.e2e.reference import assert_same_answer, reference_adapter
from tests.e2e.texts import prompt
from vllm_sparse_plugin.paged.maskers.base import has_counterpart

SINK_LOCAL = [{"type": "sink", "sink_size": 8}, {"type": "local", "window_size": 24}]
CONFIGS = {
    "quest, 16 keys, as they are": {"type": "quest_top_k", "heavy_size": 0.1, "page_size": 16},
    "quest, 8 keys, 4 bits": {
        "type": "quest_top_k",
        "heavy_size": 128,
        "page_size": 8,
        "label_bits": 4,
    },
    "top-p": {"type": "oracle_top_p", "top_p": 0.6},
    "adaptive": {
        "type": "adaptive_sampling",
        "base_rate_sampling": 0.03,
        "epsilon": 0.2,
        "delta": 0.2,
        "init_offset": 0,
        "local_offset": 0,
    },
    "double sparsity": {
        "type": "double_sparsity_top_k",
        "heavy_size": 0.1,
        "sorted_channel_file": "{channels}",
        "label_bits": 8,
    },
    "hash": {
        "type": "hash_attention_top_k",
        "heavy_size": 0.1,
        "hat_bits": 32,
        "hat_mlp_layers": 1,
        "hat_mlp_hidden_size": 1,
        "hat_mlp_activation": "silu",
        "hat_weight_file": "{weights}",
    },
    "pq, per KV head": {
        "type": "pq_cache",
        "heavy_size": 0.1,
        "head_granularity": "kv_head",
        "pq_sub_dim": 16,
        "pq_bits": 4,
        "kmeans_iterations": 3,
    },
    "socket": {"type": "socket", "heavy_size": 0.1, "K": 4, "L": 20},
    "magic pig": {"type": "magic_pig", "lsh_l": 40, "lsh_k": 5},
    "random": {"type": "random_sampling", "sampling_rate": 0.1, "seed": 3},
}
ELSEWHERE = {"sink", "local", "oracle_top_k", "causal"}  # test_parity; causal selects nothing
LAYERS, HEADS = 30, 9


def test_no_built_in_masker_is_forgotten() -> None:
    built_in = {
        name
        for name, config in MaskerRegistry.config_types().items()
        if config.__module__.startswith("sparse_attention_hub.")
    }
    assert built_in == ELSEWHERE | {masker["type"] for masker in CONFIGS.values()}


@pytest.mark.parametrize("name", CONFIGS)
def test_served_is_reference(sparse, model_path, masker_files, name, capsys) -> None:
    masker = {
        field: value.format(**masker_files) if isinstance(value, str) else value
        for field, value in CONFIGS[name].items()
    }
    # A dense first layer and a last one without the masker: choices by layer are served too.
    config = config_from_dict(
        {
            "maskers": [*SINK_LOCAL, masker],
            "dense_layers": [0],
            "layers": {str(LAYERS - 1): SINK_LOCAL},
        }
    )
    text = python_manual(["formatstrings"], 1800)
    request = Request("Read this.\n\n" + text, "\n\nWhat is a field?")
    arguments = {"max_new_tokens": 8}
    served = ModelAdapterVLLM(
        model_path, config, base_url=sparse.server.base_url, sparse_by_default=True
    )
    neighbour = prompt(model_path, 2500, 200)
    general_rows = sparse.statistics().json()["totals"]["general_rows"]
    with ThreadPoolExecutor() as pool:
        beside = pool.submit(sparse.complete, neighbour, tokens=16, sparse_attention="off")
        found = served.process_request(request, arguments)
        assert len(beside.result().token_ids) > 0
    took_general = sparse.statistics().json()["totals"]["general_rows"] > general_rows
    # Only what has no counterpart on pages takes the general path.
    assert took_general != has_counterpart(type(config.masker_configs[-1]))
    with reference_adapter(model_path, config) as adapter:
        reference = adapter.process_request(request, arguments, {"return_logits": True})
    for expected, answer in zip(reference.details, found.details, strict=True):
        if assert_same_answer(expected, answer, name, capsys).is_equal:
            assert answer.visible_keys == expected.visible_keys
            # A selection is a whole page here or there when two scores tie within float noise.
            assert answer.read_keys == pytest.approx(expected.read_keys, rel=1e-3)
            assert answer.density < 0.6
