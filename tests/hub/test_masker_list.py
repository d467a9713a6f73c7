"""What must hold for every masker of the registry: it is documented, and JSON carries it."""

from pathlib import Path

import pytest

from sparse_attention_hub.sparse_attention.research_attention.maskers.base import MaskerRegistry
from sparse_attention_hub.sparse_attention.serialization import (
    config_from_dict,
    config_from_json,
    config_to_dict,
    config_to_json,
)

README = Path(__file__).resolve().parents[2] / "README.md"
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
    {"type": "random_sampling", "sampling_rate": 0.05, "seed": 7},
    {
        "type": "adaptive_sampling",
        "base_rate_sampling": 0.02,
        "epsilon": 0.1,
        "delta": 0.1,
        "init_offset": 4,
        "local_offset": 0.0,
        "seed": 7,
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


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example["type"])
def test_readme_lists_the_masker_and_its_fields(example) -> None:
    if example["type"] == "causal":  # selects nothing; there for the field's API alone
        return
    rows = [line for line in README.read_text().splitlines() if line.startswith("| `")]
    row = next(line for line in rows if line.startswith(f"| `{example['type']}` |"))
    for field in example:
        if field != "type":
            assert f"`{field}`" in row
