"""What must hold for every masker of the registry: it is documented, and JSON carries it."""

import tempfile
from pathlib import Path

import pytest

from sparse_attention_hub.sparse_attention.masker_table import masker_table
from sparse_attention_hub.sparse_attention.research_attention.maskers.base import MaskerRegistry
from sparse_attention_hub.sparse_attention.serialization import (
    config_from_dict,
    config_from_json,
    config_to_dict,
    config_to_json,
)

README = Path(__file__).resolve().parents[2] / "README.md"
# Files that exist when the configurations are made; what is in them matters to maskers only.
FOLDER = Path(tempfile.mkdtemp())
CHANNELS, WEIGHTS = str(FOLDER / "channels.json"), str(FOLDER / "weights.safetensors")
for file in (CHANNELS, WEIGHTS):
    Path(file).touch()
EXAMPLES = [
    {"type": "sink", "sink_size": 4},
    {"type": "local", "window_size": 0.1},
    {"type": "causal"},
    {"type": "oracle_top_k", "heavy_size": 32, "head_granularity": "kv_head"},
    {"type": "oracle_top_p", "top_p": 0.9},
    {
        "type": "quest_top_k",
        "heavy_size": 0.1,
        "head_granularity": "query_head",
        "page_size": 16,
        "label_bits": 4,
    },
    {
        "type": "double_sparsity_top_k",
        "heavy_size": 64,
        "head_granularity": "query_head",
        "sorted_channel_file": CHANNELS,
        "group_factor": 4,
        "label_bits": 8,
        "channel_selection": "k_proj",
    },
    {
        "type": "hash_attention_top_k",
        "heavy_size": 64,
        "head_granularity": "kv_head",
        "hat_bits": 40,
        "hat_mlp_layers": 2,
        "hat_mlp_hidden_size": 24,
        "hat_mlp_activation": "silu",
        "hat_weight_file": WEIGHTS,
    },
    {
        "type": "pq_cache",
        "heavy_size": 0.1,
        "head_granularity": "query_head",
        "pq_sub_dim": 8,
        "pq_bits": 4,
        "kmeans_iterations": 3,
    },
    {
        "type": "socket",
        "heavy_size": 0.1,
        "head_granularity": "query_head",
        "K": 6,
        "L": 20,
        "tau": 0.4,
        "seed": 5,
    },
    {
        "type": "magic_pig",
        "lsh_l": 20,
        "lsh_k": 6,
        "center": False,
        "packing": "int64",
        "seed": 5,
    },
    {
        "type": "random_sampling",
        "sampling_rate": 0.05,
        "seed": 7,
        "head_granularity": "kv_head",
    },
    {
        "type": "adaptive_sampling",
        "base_rate_sampling": 0.02,
        "epsilon": 0.1,
        "delta": 0.1,
        "init_offset": 4,
        "local_offset": 0.0,
        "seed": 7,
        "head_granularity": "kv_head",
    },
]


def built_in() -> set[str]:
    return {
        name
        for name, config in MaskerRegistry.config_types().items()
        if config.__module__.startswith("sparse_attention_hub.")
    }


def test_every_masker_has_an_example_here() -> None:
    assert {example["type"] for example in EXAMPLES} == built_in()


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example["type"])
def test_json_round_trip_with_every_field(example) -> None:
    config = config_from_dict({"maskers": [example]})
    assert config_to_dict(config)["maskers"] == [example]
    assert config_from_json(config_to_json(config)) == config


def test_readme_has_the_table_of_the_registry() -> None:
    # Maskers that other tests register state no facts, and so are not in the table.
    assert masker_table() in README.read_text()


def test_every_built_in_masker_states_its_facts() -> None:
    for name, config in MaskerRegistry.config_types().items():
        if name in built_in():
            assert MaskerRegistry.get_masker_class(config).facts is not None
