"""The server-wide configuration: every way to give it, and every way to get it wrong."""

import json

import pytest

from sparse_attention_hub.sparse_attention.presets import get_preset
from vllm_sparse_plugin.serving_config import ServingConfig

SINK_LOCAL = {"maskers": [{"type": "sink", "sink_size": 4}, {"type": "local", "window_size": 64}]}


def test_object_round_trips_through_json() -> None:
    config = ServingConfig.parse({**SINK_LOCAL, "sparse_by_default": False, "imports": ["json"]})
    assert [type(c).__name__ for c in config.attention.masker_configs] == [
        "SinkMaskerConfig",
        "LocalMaskerConfig",
    ]
    assert config.sparse_by_default is False
    assert ServingConfig.parse(json.loads(json.dumps(config.to_dict()))) == config


def test_preset_by_name_and_as_field() -> None:
    assert ServingConfig.parse("streaming-llm").attention == get_preset("streaming-llm")
    assert ServingConfig.parse({"preset": "streaming-llm"}).attention == get_preset("streaming-llm")
    fields = {"quest_top_k.heavy_size": 0.03}
    changed = ServingConfig.parse({"preset": "quest", "set": fields, "min_sparse_keys": 7})
    assert changed.attention == get_preset("quest", fields)
    assert changed.min_sparse_keys == 7
    assert ServingConfig.parse(changed.to_dict()) == changed


@pytest.mark.parametrize("suffix", [".json", ".yaml", ".yml"])
def test_file(tmp_path, suffix: str) -> None:
    path = tmp_path / f"sparse{suffix}"
    if suffix == ".json":
        path.write_text(json.dumps(SINK_LOCAL))
    else:
        path.write_text(
            "maskers:\n  - {type: sink, sink_size: 4}\n  - {type: local, window_size: 64}\n"
        )
    assert ServingConfig.parse(str(path)) == ServingConfig.parse(SINK_LOCAL)


def test_no_maskers_is_a_dense_server() -> None:
    assert ServingConfig.parse({"maskers": []}).attention.masker_configs == []


@pytest.mark.parametrize(
    ("text", "says", "hints"),
    [
        ("raise ZeroDivisionError('of mine')", "ZeroDivisionError: of mine", False),
        ("import no_such_module_either", "No module named 'no_such_module_either'", False),
        ("from json import nothing", "ImportError: cannot import name 'nothing'", False),
        (None, "ModuleNotFoundError: No module named 'module_of_mine'", True),
    ],
)
def test_a_module_that_fails_is_not_one_that_is_missing(
    text: str | None, says: str, hints: bool, tmp_path, monkeypatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    if text is not None:
        (tmp_path / "module_of_mine.py").write_text(text)
    with pytest.raises(ValueError, match="imports: cannot import 'module_of_mine") as error:
        ServingConfig.parse({**SINK_LOCAL, "imports": ["module_of_mine"]})
    assert says in str(error.value)
    assert ("PYTHONPATH" in str(error.value)) is hints
    with pytest.raises(ValueError, match="PYTHONPATH"):
        ServingConfig.parse({**SINK_LOCAL, "imports": ["json.no_such_part"]})
    (tmp_path / "2 of-mine.py").write_text("")
    ServingConfig.parse({**SINK_LOCAL, "imports": ["2 of-mine"]})  # as importlib has it


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (None, ["--additional-config", "'sparse_attention'", "streaming-llm"]),
        (7, ["--additional-config", "7"]),
        ("no-such-preset", ["no-such-preset", "streaming-llm"]),
        ("missing.json", ["missing.json"]),
        ({}, ["maskers", "preset"]),
        ({**SINK_LOCAL, "preset": "streaming-llm"}, ["maskers", "preset"]),
        ({**SINK_LOCAL, "set": {}}, ["sparse_attention.set does not go with", "maskers"]),
        ({"preset": "quest", "dense_layers": [1]}, ["dense_layers does not go with", "preset"]),
        (
            {"preset": "quest", "set": {"quest_top_k.x": 1}},
            ["maskers[2].x is not a field", "heavy_size"],
        ),
        ({**SINK_LOCAL, "min_sparse_keys": -1}, ["min_sparse_keys", "-1", "auto"]),
        ({**SINK_LOCAL, "index": [{"type": "snik"}]}, ["index[0]", "snik", "sink"]),
        ({**SINK_LOCAL, "index": "quest"}, ["index", "'quest'"]),
        ({**SINK_LOCAL, "request_files": ["/nope"]}, ["request_files", "'/nope'"]),
        ({**SINK_LOCAL, "imports": [""]}, ["imports: cannot import ''"]),
        ({**SINK_LOCAL, "imports": [".x"]}, ["imports: cannot import '.x'"]),
        ({**SINK_LOCAL, "sparse_by_defualt": True}, ["sparse_by_defualt", "sparse_by_default"]),
        ({**SINK_LOCAL, "sparse_by_default": "yes"}, ["sparse_by_default", "'yes'", "true"]),
        ({**SINK_LOCAL, "allow_request_config": 1}, ["allow_request_config", "1"]),
        ({**SINK_LOCAL, "imports": "json"}, ["imports", "'json'"]),
        (
            {**SINK_LOCAL, "imports": ["no_such_module_at_all"]},
            ["no_such_module_at_all", "PYTHONPATH"],
        ),
        ({"maskers": [{"type": "snik", "sink_size": 4}]}, ["snik", "sink"]),
        ({"maskers": [{"type": "sink", "size": 4}]}, ["size", "sink_size"]),
        ({"maskers": [{"type": "sink"}]}, ["sink_size"]),
        ({"maskers": [{"type": "sink", "sink_size": 0}]}, ["sink_size", "0"]),
        ({"maskers": [{"type": "sink", "sink_size": -4}]}, ["sink_size", "-4"]),
        ({"maskers": [{"type": "local", "window_size": float("nan")}]}, ["window_size", "nan"]),
        ({"maskers": [{"type": "oracle_top_k", "heavy_size": 1.5}]}, ["heavy_size", "1.5"]),
        ({"maskers": [{"type": "oracle_top_k", "heavy_size": True}]}, ["heavy_size", "True"]),
        ({"maskers": {"type": "sink"}}, ["maskers"]),
    ],
)
def test_bad_values_name_field_value_and_allowed(value: object, says: list[str]) -> None:
    with pytest.raises(ValueError, match="sparse_attention") as error:
        ServingConfig.parse(value)
    for part in says:
        assert part in str(error.value)


@pytest.mark.parametrize("text", ["{", "[1, 2]", '"streaming-llm"'])
def test_bad_file(tmp_path, text: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"bad\.json"):
        ServingConfig.parse(str(path))


def test_bad_yaml(tmp_path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("maskers: [")
    with pytest.raises(ValueError, match=r"bad\.yaml is not valid YAML"):
        ServingConfig.parse(str(path))


def test_a_file_that_is_no_text(tmp_path) -> None:
    path = tmp_path / "bad.json"
    path.write_bytes(b"\xff\xfe{}")
    with pytest.raises(ValueError, match=r"cannot read the configuration file .*bad\.json"):
        ServingConfig.parse(str(path))
