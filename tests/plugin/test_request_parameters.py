"""Per-request parameters: defaults, overrides, and what is refused at admission."""

import json
import pickle

import msgspec
import pytest

from sparse_attention_hub.sparse_attention.presets import get_preset
from sparse_attention_hub.sparse_attention.serialization import config_fingerprint, config_to_json
from vllm_sparse_plugin.request_parameters import RESOLVED, RequestParameters, resolve_request
from vllm_sparse_plugin.serving_config import ServingConfig

SERVER = ServingConfig.parse({"preset": "streaming-llm"})
OPT_IN = ServingConfig.parse({"preset": "streaming-llm", "sparse_by_default": False})
CLOSED = ServingConfig.parse({"preset": "streaming-llm", "allow_request_config": False})
DENSE = ServingConfig.parse({"maskers": []})


def resolved(extra_args: dict | None, server: ServingConfig = SERVER) -> RequestParameters | None:
    return RequestParameters.from_extra_args(resolve_request(extra_args, server))


def test_default_is_sparse_decoding_after_a_dense_prompt() -> None:
    parameters = resolved(None)
    assert parameters is not None
    assert parameters.fingerprint == config_fingerprint(SERVER.attention)
    assert parameters.dense_prefix_tokens(17) == 17


@pytest.mark.parametrize("off", ["off", 0, False])
def test_off_leaves_the_request_exactly_as_it_was(off: object) -> None:
    extra_args = {"sparse_attention": off, "else": 1}
    assert resolve_request(extra_args, SERVER) is extra_args


def test_server_without_default_needs_on() -> None:
    assert resolve_request(None, OPT_IN) is None
    assert resolved({"sparse_attention": "on"}, OPT_IN) is not None


def test_server_without_maskers_is_dense_unless_the_request_brings_some() -> None:
    assert resolve_request(None, DENSE) is None
    assert resolved({"sparse_attention_config": "streaming-llm"}, DENSE) is not None


def test_request_maskers_as_json_or_preset() -> None:
    config = get_preset("sink-local-oracle")
    for value in ("sink-local-oracle", config_to_json(config)):
        parameters = resolved({"sparse_attention_config": value})
        assert parameters is not None
        assert parameters.fingerprint == config_fingerprint(config)


@pytest.mark.parametrize("prefix", [0, 1, 4000])
def test_dense_prefix(prefix: int) -> None:
    parameters = resolved({"sparse_attention_dense_prefix": prefix})
    assert parameters is not None
    assert parameters.dense_prefix_tokens(17) == prefix


def test_tagged_dense_request_has_a_record_without_maskers() -> None:
    parameters = resolved({"sparse_attention": "off", "sparse_attention_tag": "a.b-c_1"})
    assert parameters == RequestParameters(None, "", None, "a.b-c_1")


def test_plugin_not_selected_touches_nothing() -> None:
    extra_args = {"else": 1}
    assert resolve_request(extra_args, None) is extra_args
    assert resolve_request(None, None) is None
    with pytest.raises(ValueError, match="--attention-backend CUSTOM"):
        resolve_request({"sparse_attention": "on"}, None)


def test_reused_sampling_params_are_resolved_again() -> None:
    once = resolve_request({"sparse_attention_dense_prefix": 5}, SERVER)
    assert resolve_request(once, SERVER) == once


def test_record_survives_the_ways_between_processes() -> None:
    extra_args = resolve_request({"sparse_attention_dense_prefix": 5}, SERVER)
    expected = RequestParameters.from_extra_args(extra_args)
    through_msgpack = msgspec.msgpack.decode(msgspec.msgpack.encode(extra_args))
    assert RequestParameters.from_extra_args(through_msgpack) == expected
    assert RequestParameters.from_extra_args(pickle.loads(pickle.dumps(extra_args))) == expected


@pytest.mark.parametrize(
    ("extra_args", "says"),
    [
        ({"sparse_attention": "maybe"}, ["sparse_attention", "maybe", '"on" or "off"']),
        ({"sparse_attention": 2}, ["sparse_attention", "2"]),
        ({"sparse_attention": [1]}, ["sparse_attention", "[1]"]),
        ({"sparse_attention_config": '{"preset": "quest", "sets": {}}'}, ["'sets'", "set"]),
        ({"sparse_attention_config": '{"preset": "qest"}'}, ["qest", "quest"]),
        (
            {"sparse_attention_config": '{"maskers": [{"type": "x", "hat_weight_file": ["a"]}]}'},
            ["hat_weight_file must be a file", "['a']"],
        ),
        ({"sparse_attention_dense_prefix": -1}, ["sparse_attention_dense_prefix", "-1", ">= 0"]),
        ({"sparse_attention_dense_prefix": 1.5}, ["sparse_attention_dense_prefix", "1.5"]),
        (
            {"sparse_attention_dense_prefix": 10**30},
            ["sparse_attention_dense_prefix", "<= 2147483647"],
        ),
        ({"sparse_attention_min_keys": 2**31}, ["sparse_attention_min_keys", "2147483648"]),
        ({"sparse_attention_dense_prefix": "7"}, ["sparse_attention_dense_prefix", "'7'"]),
        ({"sparse_attention_dense_prefix": True}, ["sparse_attention_dense_prefix", "True"]),
        ({"sparse_attention_config": "nope"}, ["sparse_attention_config", "nope", "streaming-llm"]),
        ({"sparse_attention_config": "{"}, ["sparse_attention_config"]),
        ({"sparse_attention_config": 3}, ["sparse_attention_config", "3"]),
        (
            {"sparse_attention_config": '{"maskers": [{"type": "sink", "sink_size": -1}]}'},
            ["sparse_attention_config", "sink_size", "-1"],
        ),
        (
            {"sparse_attention_config": '{"maskers": [{"type": "sink", "sink_size": 2147483648}]}'},
            ["sparse_attention_config", "sink_size", "2147483648", "<= 2147483647"],
        ),
        ({"sparse_attention_tag": ""}, ["sparse_attention_tag"]),
        ({"sparse_attention_tag": "a b"}, ["sparse_attention_tag", "'a b'"]),
        ({"sparse_attention_tag": "x" * 65}, ["sparse_attention_tag"]),
        ({"sparse_attentoin": "on", "sparse_attention_prefix": 3}, ["sparse_attention_prefix"]),
        ({RESOLVED: {"config_json": None}}, [RESOLVED, "allowed"]),
    ],
)
def test_bad_values_name_parameter_value_and_allowed(extra_args: dict, says: list[str]) -> None:
    with pytest.raises(ValueError, match="vllm_xargs") as error:
        resolve_request(extra_args, SERVER)
    for part in says:
        assert part in str(error.value)


def test_request_maskers_can_be_switched_off() -> None:
    with pytest.raises(ValueError, match="allow_request_config"):
        resolve_request({"sparse_attention_config": "streaming-llm"}, CLOSED)


def test_a_request_names_no_file_that_the_server_does_not(tmp_path) -> None:
    path = tmp_path / "channels.json"
    path.write_text("{}")
    masker = {"type": "double_sparsity_top_k", "heavy_size": 8, "sorted_channel_file": str(path)}
    given = {"sparse_attention_config": json.dumps({"maskers": [masker]})}
    with pytest.raises(ValueError, match="sorted_channel_file must be a file that the server"):
        resolve_request(given, SERVER)
    in_layer = {"maskers": [], "layers": {"3": [masker]}}
    with pytest.raises(ValueError, match="sorted_channel_file must be a file that the server"):
        resolve_request({"sparse_attention_config": json.dumps(in_layer)}, SERVER)
    for server in (
        {"preset": "streaming-llm", "request_files": [str(path)]},
        {"maskers": [masker]},
    ):
        assert resolve_request(given, ServingConfig.parse(server)) is not None


def test_a_request_may_name_files_of_the_index(tmp_path) -> None:
    channels = tmp_path / "channels.json"
    channels.write_text("{}")
    masker = {
        "type": "double_sparsity_top_k",
        "heavy_size": 4,
        "sorted_channel_file": str(channels),
    }
    server = ServingConfig.parse({"maskers": [{"type": "sink", "sink_size": 4}], "index": [masker]})
    given = {"sparse_attention_config": json.dumps({"maskers": [masker]})}
    assert resolve_request(given, server) is not None


def config_of(*maskers: dict, **rest: object) -> str:
    return json.dumps({"maskers": list(maskers), **rest})


SINK = {"type": "sink", "sink_size": 1}


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ('{"a":' + "[" * 60_000, "is nested too deeply"),
        (config_of(SINK) + " " * (1 << 16), "at most 65536 characters, got"),
        (config_of(*[SINK] * 17), "at most 16 maskers in a layer, got 17"),
        (config_of(layers={"3": [SINK] * 17}), "at most 16 maskers in a layer, got 17"),
        ("q" * 40_000, "preset"),
        (config_of({**SINK, "sink_size": "9" * 40_000}), "sink_size"),
        (
            config_of({**SINK, "sink_size": 7}).replace("7", "7" * 40_000),
            r"vllm_xargs.sparse_attention_config: .*digits",
        ),
        (config_of({**SINK, "x" * 40_000 + "_file": 1}), "the server's own configuration"),
        (
            config_of(layers={str(layer): [SINK] * 13 for layer in range(20)}),
            "at most 256 maskers in all layers together, got 260",
        ),
    ],
    ids=[
        "nested",
        "long",
        "many",
        "many of a layer",
        "long name",
        "long value",
        "long number",
        "long name of a file",
        "many of all layers",
    ],
)
def test_what_is_too_much_is_refused_in_few_words(value: str, words: str) -> None:
    with pytest.raises(ValueError, match=words) as refused:
        resolved({"sparse_attention_config": value})
    assert len(str(refused.value)) < 1000


@pytest.mark.parametrize("server", [SERVER, None])
@pytest.mark.parametrize(
    "name",
    [
        "sparse_attention",
        "sparse_attention_tag",
        "sparse_attention_min_keys",
        "sparse_attention_dense_prefix",
        "sparse_attention_" + "x" * 100_000,
    ],
)
def test_long_values_are_not_sent_back_whole(name: str, server: ServingConfig | None) -> None:
    with pytest.raises(ValueError, match=name[:30]) as refused:
        resolved({name: "x" * 100_000}, server)
    assert len(str(refused.value)) < 1000
