"""Channel calibration and readings of layers, on the real model."""

import json
import re

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.documents import python_manual
from sparse_attention_hub.adapters import calibrate_channels
from sparse_attention_hub.adapters.attention_observation import decode_step_inputs, read_layers
from sparse_attention_hub.sparse_attention.research_attention.maskers.fixed.implementations.utils.double_sparsity_utils import (  # noqa: E501
    load_sorted_channels_from_file,
)
from sparse_attention_hub.sparse_attention.serialization import config_from_dict
from tests.captured_attention import captured_layers
from tests.e2e.tiny_models import write_tiny_model


@pytest.fixture(scope="module")
def tokens(model_path) -> list[int]:
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    return tokenizer(python_manual(["formatstrings"], 1500))["input_ids"]


def test_calibration_orders_channels_by_their_part_in_scores(model_path, tokens) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    before = model.config._attn_implementation
    data = calibrate_channels.calibrated_channels(model, tokens)
    assert model.config._attn_implementation == before
    layer = captured_layers(model_path, tokens)[7]
    for head in (0, 5):
        query, key = layer.query[0, head], layer.key[0, head // 3]
        # The mean of |q * k| over all pairs of tokens, by definition.
        importance = torch.einsum("qc,kc->c", query.abs().double(), key.abs().double())
        order = data["model.layers.7.self_attn.qk_proj"][head]
        ranked = importance[order]
        assert (ranked[:-1] >= ranked[1:] * (1 - 1e-9)).all()
    assert len(data) == 90
    assert len(data["model.layers.0.self_attn.k_proj"]) == 3


def test_calibrated_channels_beat_the_same_number_of_others(model_path, tokens, tmp_path) -> None:
    text, output = tmp_path / "text.txt", tmp_path / "channels.json"
    text.write_text(python_manual(["string-methods"], 3000))
    calibrate_channels.main([model_path, "--text", str(text), "--output", str(output)])
    best = load_sorted_channels_from_file(output)
    worst = tmp_path / "worst.json"
    worst.write_text(json.dumps({k: [head[::-1] for head in v] for k, v in best.items()}))
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    inputs = decode_step_inputs(model, tokens)
    errors = []
    for path in (output, worst):
        masker = {
            "type": "double_sparsity_top_k",
            "heavy_size": 0.1,
            "sorted_channel_file": str(path),
            "group_factor": 8,
        }
        readings = read_layers(config_from_dict({"maskers": [masker]}), inputs)
        errors.append(torch.stack([reading.error for reading in readings]).mean().item())
        assert all(torch.allclose(r.density, r.density[:1]) for r in readings)
    assert errors[0] < errors[1] / 2


def test_learned_sinks_are_in_what_is_read(model_path, tokens, tmp_path) -> None:
    """Reading every key makes no error, and reading some does."""
    folder = write_tiny_model("granite-swa", tmp_path, model_path)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    inputs = decode_step_inputs(model, tokens[:100])
    own = [layer.self_attn.sinks for layer in model.model.layers]
    assert all(
        torch.equal(layer.sink_logits, sinks) for layer, sinks in zip(inputs, own, strict=True)
    )
    for share, is_right in ((1.0, True), (0.1, False)):
        config = config_from_dict({"maskers": [{"type": "local", "window_size": share}]})
        errors = torch.stack([layer.error for layer in read_layers(config, inputs)])
        assert bool((errors < 1e-5).all()) is is_right


def test_a_text_without_tokens_is_refused(model_path) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_path)
    with pytest.raises(ValueError, match="no tokens"):
        calibrate_channels.calibrated_channels(model, [])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--text": "missing.txt"}, "--text: .*missing.txt"),
        ({"--text": "bytes.txt"}, "--text: .*utf-8"),
        ({"--text": "empty.txt"}, "no tokens"),
        ({"--output": "missing/channels.json"}, "--output: there is no folder .*missing"),
        ({"--max-tokens": "0"}, "--max-tokens must be at least 1, got 0"),
        ({"model": "missing"}, "missing"),
    ],
)
def test_what_is_wrong_with_the_command_is_said(
    model_path, tmp_path, monkeypatch, capsys, change: dict[str, str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("A text.")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\xff")
    (tmp_path / "empty.txt").write_text("")
    named = {"--text": "text.txt", "--output": "channels.json", **change}
    model = named.pop("model", model_path)
    with pytest.raises(SystemExit) as ended:
        calibrate_channels.main([model, *(word for pair in named.items() for word in pair)])
    assert ended.value.code == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "channels.json").exists()
