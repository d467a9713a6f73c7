"""Configurations: what is allowed, and their way through JSON and the registry."""

import dataclasses
import json

import numpy as np
import pytest

from sparse_attention_hub.sparse_attention import (
    LocalMaskerConfig,
    OracleTopKConfig,
    QuestTopKMaskerConfig,
    ResearchAttention,
    ResearchAttentionConfig,
    SinkMaskerConfig,
    SparseAttention,
    SparseAttentionConfig,
    TopKMaskerConfig,
)
from sparse_attention_hub.sparse_attention.presets import PRESETS, get_preset, preset_from_dict
from sparse_attention_hub.sparse_attention.research_attention.maskers.base import (
    MaskerConfig,
    MaskerRegistry,
    ResearchMasker,
    json_name,
    require_config,
)
from sparse_attention_hub.sparse_attention.research_attention.maskers.fixed import (
    CausalMasker,
    FixedMaskerConfig,
    SinkMasker,
    SocketMaskerConfig,
)
from sparse_attention_hub.sparse_attention.serialization import (
    config_fingerprint,
    config_from_dict,
    config_from_json,
    config_to_dict,
    config_to_json,
)

FIELDS = {
    "sink_size": SinkMaskerConfig,
    "window_size": LocalMaskerConfig,
    "heavy_size": OracleTopKConfig,
}


@pytest.mark.parametrize(
    "size", [0, -1, True, False, float("nan"), float("inf"), 0.0, -0.1, 1.5, "8", None, [1]]
)
@pytest.mark.parametrize("field", FIELDS)
def test_sizes_that_mean_nothing(field: str, size: object) -> None:
    with pytest.raises(ValueError, match="integer >= 1") as error:
        FIELDS[field](**{field: size})
    assert field in str(error.value)
    assert repr(size) in str(error.value)
    assert "(0, 1]" in str(error.value)


@pytest.mark.parametrize("field", FIELDS)
def test_sizes_become_plain_numbers(field: str) -> None:
    for given, kept in ((np.int64(3), 3), (np.float64(0.25), 0.25), (1.0, 1.0), (7, 7)):
        value = getattr(FIELDS[field](given), field)
        assert value == kept
        assert type(value) is type(kept)


def test_whole_numbers_become_plain_ones() -> None:
    config = QuestTopKMaskerConfig(np.int32(64), np.int64(8), np.uint8(4))
    assert config == QuestTopKMaskerConfig(64, 8, 4)
    assert [type(value) for value in (config.page_size, config.label_bits)] == [int, int]


@pytest.mark.parametrize("field", FIELDS)
def test_configs_are_frozen(field: str) -> None:
    config = FIELDS[field](3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config, field, 4)


def test_the_list_is_the_configs_own_and_checked() -> None:
    maskers = [SinkMaskerConfig(3)]
    config = ResearchAttentionConfig(maskers)
    maskers.append(LocalMaskerConfig(3))
    assert config.masker_configs == [SinkMaskerConfig(3)]
    assert hash(config) == hash(ResearchAttentionConfig([SinkMaskerConfig(3)]))
    with pytest.raises(ValueError, match=r"masker_configs\[0\].*'sink'"):
        ResearchAttentionConfig(["sink"])


def test_json_round_trip() -> None:
    config = ResearchAttentionConfig(
        [SinkMaskerConfig(4), LocalMaskerConfig(0.1), OracleTopKConfig(1.0), FixedMaskerConfig()]
    )
    data = config_to_dict(config)
    assert data["maskers"][0] == {"type": "sink", "sink_size": 4}
    assert [masker["type"] for masker in data["maskers"]] == [
        "sink",
        "local",
        "oracle_top_k",
        "causal",
    ]
    assert config_from_dict(json.loads(json.dumps(data))) == config
    assert config_from_json(config_to_json(config)) == config
    # 1 key and all keys are different things.
    assert config_from_json(config_to_json(config)).masker_configs[2].heavy_size == 1.0
    assert isinstance(config_from_json(config_to_json(config)).masker_configs[2].heavy_size, float)


@pytest.mark.parametrize(
    ("data", "parts"),
    [
        ([], ["object"]),
        ({}, ['"maskers"', "None"]),
        ({"maskers": {}}, ['"maskers" must be a list']),
        ({"maskers": [], "presets": 1}, ["'presets'", "allowed: dense_layers, layers, maskers"]),
        ({"maskers": ["sink"]}, ["maskers[0]", "'sink'"]),
        ({"maskers": [{}]}, ["maskers[0].type", "None", "allowed:"]),
        ({"maskers": [{"type": "snik"}]}, ["'snik'", "allowed:", "did you mean 'sink'"]),
        ({"maskers": [{"type": ["sink"]}]}, ["maskers[0].type"]),
        ({"maskers": [{"type": "sink"}]}, ["maskers[0].sink_size is missing"]),
        (
            {"maskers": [{"type": "sink", "sink_size": 1, "sinksize": 2}]},
            ["maskers[0].sinksize", "allowed: sink_size"],
        ),
        (
            {"maskers": [{"type": "sink", "sink_size": -2}]},
            ["maskers[0] (sink)", "sink_size", "-2"],
        ),
        ({"maskers": [{"type": "sink", "sink_size": 1, "search_space": {}}]}, ["search_space"]),
    ],
)
def test_reader_says_where_and_what_is_allowed(data: object, parts: list[str]) -> None:
    with pytest.raises(ValueError, match=".") as error:
        config_from_dict(data)
    for part in parts:
        assert part in str(error.value)


def test_not_json() -> None:
    with pytest.raises(ValueError, match="must be JSON"):
        config_from_json("{")


def test_fingerprint() -> None:
    one = ResearchAttentionConfig([SinkMaskerConfig(4), LocalMaskerConfig(8)])
    same = ResearchAttentionConfig(
        [SinkMaskerConfig(4, search_space={"a": 1}), LocalMaskerConfig(8)]
    )
    assert one == same
    assert config_fingerprint(one) == config_fingerprint(same)
    # Pinned: it is part of cache keys, and must be the same in every process and release.
    assert config_fingerprint(ResearchAttentionConfig([])) == "5fe842988e56e75e"
    others = [
        ResearchAttentionConfig([LocalMaskerConfig(8), SinkMaskerConfig(4)]),
        ResearchAttentionConfig([SinkMaskerConfig(4), LocalMaskerConfig(9)]),
        ResearchAttentionConfig([SinkMaskerConfig(4)]),
        ResearchAttentionConfig([OracleTopKConfig(1)]),
        ResearchAttentionConfig([OracleTopKConfig(1.0)]),
    ]
    assert len({config_fingerprint(config) for config in [one, *others]}) == 6


def test_presets(tmp_path) -> None:
    assert set(PRESETS) == {
        "streaming-llm",
        "sink-local-oracle",
        "balanced",
        "quest",
        "double-sparsity",
        "hash-attention",
        "pq",
        "magic-pig",
        "vattention",
    }
    channels, weights = tmp_path / "channels.json", tmp_path / "weights.safetensors"
    for file in (channels, weights):
        file.touch()
    fields = {
        "double-sparsity": {"double_sparsity_top_k.sorted_channel_file": str(channels)},
        "hash-attention": {"hash_attention_top_k.hat_weight_file": str(weights)},
    }
    for name in PRESETS:
        config = get_preset(name, fields.get(name))
        assert config_from_dict(config_to_dict(config)) == config
        assert not config.is_dense
    for name in ("strong", None, 3):
        with pytest.raises(ValueError, match=r"balanced, .*streaming-llm, vattention"):
            get_preset(name)


@pytest.mark.parametrize("name", sorted(set(PRESETS) - {"sink-local-oracle"}))
def test_presets_load_keys_once_per_group(name: str) -> None:
    """`magic_pig` cannot, and the oracle is not there to be fast."""
    granularities = {
        masker["type"]: masker["head_granularity"]
        for masker in PRESETS[name]["maskers"]
        if masker["type"] not in ("sink", "local", "magic_pig")
    }
    assert set(granularities.values()) <= {"kv_head"}


def test_fields_of_presets() -> None:
    fields = {"quest_top_k.heavy_size": 0.03, "local.window_size": 9, "dense_layers": [4]}
    config = get_preset("quest", fields)
    data = config_to_dict(config)
    assert [masker.get("heavy_size") for masker in data["maskers"]] == [None, None, 0.03]
    assert data["maskers"][1]["window_size"] == 9
    assert data["dense_layers"] == [4]
    assert get_preset("quest") != config  # the preset itself is as it was
    assert preset_from_dict({"preset": "quest", "set": fields}) == config


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("double-sparsity", {}, r"preset 'double-sparsity': .*sorted_channel_file is missing"),
        ("quest", {"heavy_size": 1}, "allowed: dense_layers, local.FIELD, quest_top_k.FIELD"),
        ("quest", {"oracle_top_k.heavy_size": 1}, "'oracle_top_k.heavy_size' is not a field"),
        ("quest", {"quest_top_k.heavy": 1}, "did you mean 'heavy_size'"),
        ("quest", {"quest_top_k.page_size": 0}, "page_size must be an integer in .*, got 0"),
    ],
)
def test_bad_fields_of_presets(name: str, fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get_preset(name, fields)
    with pytest.raises(ValueError, match='"set" must be an object'):
        preset_from_dict({"preset": "quest", "set": [1]})


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch):
    """The registry, put back afterwards."""
    monkeypatch.setattr(MaskerRegistry, "_maskers", dict(MaskerRegistry._maskers))
    monkeypatch.setattr(MaskerRegistry, "_names", dict(MaskerRegistry._names))
    return MaskerRegistry


@dataclasses.dataclass(frozen=True)
class EveryOtherKeyMaskerConfig(MaskerConfig):
    offset: int = 0


class EveryOtherKeyMasker(ResearchMasker):
    def add_mask(self, *, previous_mask, **kwargs):
        return previous_mask

    @classmethod
    def create_from_config(cls, config):
        return cls(require_config(config, EveryOtherKeyMaskerConfig))


def test_a_masker_of_ones_own_is_usable_at_once(registry) -> None:
    config = ResearchAttentionConfig([EveryOtherKeyMaskerConfig(1)])
    with pytest.raises(ValueError, match="EveryOtherKeyMaskerConfig; registered: .*SinkMasker"):
        ResearchAttention.create_from_config(config)
    registry.register(EveryOtherKeyMaskerConfig)(EveryOtherKeyMasker)
    assert json_name(EveryOtherKeyMaskerConfig) == "every_other_key"
    assert config_from_dict({"maskers": [{"type": "every_other_key", "offset": 1}]}) == config
    masker = ResearchAttention.create_from_config(config).maskers[0]
    assert isinstance(masker, EveryOtherKeyMasker)
    registry.register(EveryOtherKeyMaskerConfig)(EveryOtherKeyMasker)
    assert registry.get_all_registered_types()[EveryOtherKeyMaskerConfig] is EveryOtherKeyMasker


@pytest.mark.parametrize("base", [FixedMaskerConfig, SocketMaskerConfig, SinkMaskerConfig])
def test_a_json_name_is_not_inherited(registry, base) -> None:
    @dataclasses.dataclass(frozen=True)
    class OwnMaskerConfig(base):
        """Says nothing about its name."""

    registry.register(OwnMaskerConfig)(EveryOtherKeyMasker)
    assert json_name(OwnMaskerConfig) == "own"
    assert json_name(base) in ("causal", "socket", "sink")
    assert registry.config_types()["own"] is OwnMaskerConfig


def test_an_attention_of_ones_own() -> None:
    class Own(SparseAttention):
        def custom_attention(self, *arguments, **kwargs):
            return arguments

    config = SparseAttentionConfig()
    own = Own.create_from_config(config)
    assert isinstance(own, Own)
    assert own.sparse_attention_config is config


def test_two_maskers_of_one_name(registry) -> None:
    @dataclasses.dataclass(frozen=True)
    class SinkConfig(MaskerConfig):
        pass

    with pytest.raises(ValueError, match="'sink'.*taken by.*SinkMaskerConfig"):
        registry.register(SinkConfig)(EveryOtherKeyMasker)


def test_wrong_types() -> None:
    with pytest.raises(ValueError, match="expected a SinkMaskerConfig, got LocalMaskerConfig"):
        SinkMasker.create_from_config(LocalMaskerConfig(3))
    with pytest.raises(ValueError, match="expected a FixedMaskerConfig, got SinkMaskerConfig"):
        CausalMasker.create_from_config(SinkMaskerConfig(3))
    with pytest.raises(ValueError, match="TopKMaskerConfig"):
        ResearchMasker.create_masker_from_config(TopKMaskerConfig(3))
    with pytest.raises(TypeError, match="SparseAttentionConfig"):
        SparseAttention.create_from_config(SparseAttentionConfig())
    with pytest.raises(TypeError, match="SparseAttentionConfig"):
        ResearchAttention.create_from_config(SparseAttentionConfig())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((SinkMaskerConfig(3),), "masker_configs must be a list of MaskerConfig"),
        (([], 1), "dense_layers must be layer indices, got 1"),
    ],
)
def test_fields_of_another_kind(arguments: tuple, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        ResearchAttentionConfig(*arguments)


def test_a_layer_is_named_once() -> None:
    with pytest.raises(ValueError, match=r'"layers" names a layer twice: 5, 05'):
        config_from_dict({"maskers": [], "layers": {"5": [], "05": []}})


def test_an_activation_is_a_name() -> None:
    masker = {
        "type": "hash_attention_top_k",
        "heavy_size": 1,
        "hat_bits": 8,
        "hat_mlp_layers": 1,
        "hat_mlp_hidden_size": 8,
        "hat_mlp_activation": [],
        "hat_weight_file": "none",
    }
    with pytest.raises(ValueError, match=r"hat_mlp_activation must be one of .*got \[\]"):
        config_from_dict({"maskers": [masker]})
