"""One wrong value per field: the error names the field and the value."""

import dataclasses
import tempfile
from pathlib import Path

import pytest

from sparse_attention_hub.sparse_attention import ResearchAttentionConfig, SinkMaskerConfig
from sparse_attention_hub.sparse_attention.research_attention.maskers.base import (
    MaskerRegistry,
    json_name,
)
from sparse_attention_hub.sparse_attention.serialization import config_from_dict

FILE = str(Path(tempfile.mkdtemp()) / "file")
Path(FILE).touch()
GOOD = {
    "sink": {"sink_size": 4},
    "local": {"window_size": 4},
    "oracle_top_k": {"heavy_size": 4},
    "oracle_top_p": {"top_p": 0.5},
    "quest_top_k": {"heavy_size": 4, "page_size": 16},
    "double_sparsity_top_k": {"heavy_size": 4, "sorted_channel_file": FILE},
    "hash_attention_top_k": {
        "heavy_size": 4,
        "hat_bits": 32,
        "hat_mlp_layers": 1,
        "hat_mlp_hidden_size": 8,
        "hat_mlp_activation": "relu",
        "hat_weight_file": FILE,
    },
    "pq_cache": {"heavy_size": 4, "pq_sub_dim": 4, "pq_bits": 4},
    "socket": {"heavy_size": 4},
    "random_sampling": {"sampling_rate": 0.5},
    "adaptive_sampling": {
        "base_rate_sampling": 0.1,
        "epsilon": 0.1,
        "delta": 0.1,
        "init_offset": 0,
        "local_offset": 0,
    },
    "magic_pig": {"lsh_l": 4, "lsh_k": 4},
}
LARGE = [2**31, 10**30]
SIZE = [0, -1, 1.5, 0.0, "4", True, None, float("nan"), *LARGE]
COUNT = [0, -1, 2.5, "3", True, *LARGE]
SEED = [-1, 1.0, 2**63, True]
HEADS = ["query", "", None, 1]
BAD = {
    "sink": {"sink_size": SIZE},
    "local": {"window_size": SIZE},
    "oracle_top_k": {"heavy_size": SIZE, "head_granularity": HEADS},
    "oracle_top_p": {"top_p": [-0.1, 1.1, "x", True, None, 10**400]},
    "quest_top_k": {
        "heavy_size": SIZE,
        "head_granularity": HEADS,
        "page_size": COUNT,
        "label_bits": [*COUNT, 17],
    },
    "double_sparsity_top_k": {
        "heavy_size": SIZE,
        "head_granularity": HEADS,
        "sorted_channel_file": ["no-such-file", 3],
        "group_factor": COUNT,
        "label_bits": [*COUNT, 17],
        "channel_selection": ["v_proj", None],
    },
    "hash_attention_top_k": {
        "heavy_size": SIZE,
        "head_granularity": HEADS,
        "hat_bits": COUNT,
        "hat_mlp_layers": COUNT,
        "hat_mlp_hidden_size": COUNT,
        "hat_mlp_activation": ["linear", None],
        "hat_weight_file": ["no-such-file", 3, None],
    },
    "pq_cache": {
        "heavy_size": SIZE,
        "head_granularity": HEADS,
        "pq_sub_dim": COUNT,
        "pq_bits": [*COUNT, 9],
        "kmeans_iterations": COUNT,
    },
    "socket": {
        "heavy_size": SIZE,
        "head_granularity": HEADS,
        "K": [*COUNT, 13],
        "L": COUNT,
        "tau": [0, -1, float("inf"), float("nan"), "1", True, 10**400],
        "seed": SEED,
    },
    "random_sampling": {
        "sampling_rate": [0, -0.1, 1.1, "x", True, 10**400],
        "seed": SEED,
        "head_granularity": HEADS,
    },
    "adaptive_sampling": {
        "base_rate_sampling": [-1, -0.1, 1.0, 1.5, True, *LARGE],
        "epsilon": [0, 1, 1.5, True],
        "delta": [0, 1, -0.5, True],
        "init_offset": [-1, 1.5, True, *LARGE],
        "local_offset": [-1, 1.5, True, *LARGE],
        "seed": SEED,
        "head_granularity": HEADS,
    },
    "magic_pig": {
        "lsh_l": [*COUNT, 1],
        "lsh_k": [*COUNT, 63],
        "center": [0, "yes", None],
        "packing": ["int8", None],
        "seed": SEED,
    },
}
CASES = [
    (masker, field, value)
    for masker, fields in BAD.items()
    for field, values in fields.items()
    for value in values
]


@pytest.mark.parametrize(("masker", "field", "value"), CASES)
def test_a_wrong_value_names_its_field(masker, field, value) -> None:
    config_from_dict({"maskers": [{"type": masker, **GOOD[masker]}]})  # right without it
    with pytest.raises(ValueError, match=rf"maskers\[0\] \({masker}\): .*{field}") as error:
        config_from_dict({"maskers": [{"type": masker, **GOOD[masker], field: value}]})
    if value is not None:
        assert repr(value) in str(error.value)


def test_every_field_of_every_masker_is_here() -> None:
    for config in MaskerRegistry.get_all_registered_types():
        name = json_name(config)
        if config.__module__.startswith("sparse_attention_hub.") and name != "causal":
            fields = {field.name for field in dataclasses.fields(config)}
            fields -= {"search_space", "hat_weights"}
            assert fields == set(BAD[name])


SINK = SinkMaskerConfig(4)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (([SINK], (-1,)), "a layer must be an integer >= 0, got -1"),
        (([SINK], (True,)), "got True"),
        (([SINK], (), {"2": [SINK]}), "got '2'"),
        (([SINK], (2,), {2: [SINK]}), "layer 2 is in dense_layers and in layer_masker_configs"),
        (([SINK], (), {2: ["sink"]}), r"layer_masker_configs\[2\]\[0\] must be a MaskerConfig"),
        ((["sink"],), r"masker_configs\[0\] must be a MaskerConfig"),
    ],
)
def test_layers(arguments, says) -> None:
    with pytest.raises(ValueError, match=says):
        ResearchAttentionConfig(*arguments)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"maskers": [], "dense_layers": 3}, '"dense_layers" must be a list'),
        ({"maskers": [], "dense_layers": ["3"]}, "got '3'"),
        ({"maskers": [], "layers": []}, '"layers" must map'),
        ({"maskers": [], "layers": {"first": []}}, '"layers" must map'),
        ({"maskers": [], "layers": {"1": {}}}, r'"layers\[1\]" must be a list'),
        ({"maskers": [], "layers": {"1": [{"type": "sink"}]}}, r"layers\[1\]\[0\].sink_size"),
    ],
)
def test_layers_in_json(data, says) -> None:
    with pytest.raises(ValueError, match=says):
        config_from_dict(data)
