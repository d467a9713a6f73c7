"""Served with `--kv-cache-dtype fp8`: as transformers answers with keys and values of 8 bits.

(vLLM's own CPU kernels cut numbers off where they are stored so, others round them.)
"""

import functools
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DynamicCache

from tests.cpu_features import needs_eight_bits
from tests.plugin.cuda.run_engines import OPTIONS, run_on_cpu, write_tiny_llama
from vllm_sparse_plugin.paged.layout import stored_as

pytestmark = needs_eight_bits

LOGPROB_ATOL = 2e-3
"""Inputs of two implementations differ by some 2**-24, which brings a few of thousands of keys' and
values' channels to the neighbouring number of 8 bits. (What 8 bits make of 16 is up to 0.3.)"""
TOKENS = 12
PROMPTS = [[(37 * place + length) % 512 for place in range(length)] for length in (130, 33, 450)]
# The last two in a batch, the longest is prefilled in two steps.
ARRIVES = (0, 20, 22)
UNSCALED = ((1.0, 1.0), (1.0, 1.0))
Answers = list[tuple[list[int], list[float]]]
OFF = {"sparse_attention": "off"}
SINK_LOCAL = [{"type": "sink", "sink_size": 4}, {"type": "local", "window_size": 16}]
EVERYTHING = [*SINK_LOCAL, {"type": "quest_top_k", "heavy_size": 1.0, "page_size": 8}]
SOME = [*SINK_LOCAL, {"type": "quest_top_k", "heavy_size": 32, "page_size": 8, "label_bits": 16}]


SCALES = ((0.03, 0.011), (0.02, 0.007))
"""Of each layer's keys and values, in a checkpoint that has some."""


class EightBitCache(DynamicCache):
    """What is stored in 8 bits, and read as what it was."""

    def __init__(self, scales) -> None:
        super().__init__()
        self._scales = scales

    def update(self, key_states, value_states, layer_idx, *arguments, **named):
        stored = (
            stored_as(rows, torch.float8_e4m3fn, scale).to(rows.dtype) * scale
            for rows, scale in zip((key_states, value_states), self._scales[layer_idx], strict=True)
        )
        return super().update(*stored, layer_idx, *arguments, **named)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_llama(tmp_path_factory.mktemp("eight-bits")))


@pytest.fixture(scope="module")
def scaled(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same model, as llm-compressor writes it: it asks for such a cache itself."""
    folder = write_tiny_llama(tmp_path_factory.mktemp("scaled"))
    weights = load_file(folder / "model.safetensors")
    for layer, scales in enumerate(SCALES):
        for name, scale in zip(("k_scale", "v_scale"), scales, strict=True):
            weights[f"model.layers.{layer}.self_attn.{name}"] = torch.tensor([scale])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "dense",
        "quantization_status": "compressed",
        "config_groups": {},
        "ignore": [],
        "kv_cache_scheme": {
            "num_bits": 8,
            "type": "float",
            "strategy": "tensor",
            "symmetric": True,
            "dynamic": False,
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.fixture(scope="module")
def reports(
    model: str, scaled: str, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    def engine(
        maskers: list[dict[str, Any]], folder: str = model, dtype: str = "fp8", **extra: Any
    ) -> dict[str, Any]:
        asked = [
            {"prompt_token_ids": prompt, "max_tokens": TOKENS, "arrives": step, "extra_args": extra}
            for prompt, step in zip(PROMPTS, ARRIVES, strict=True)
        ]
        options = {
            **OPTIONS,
            "model": folder,
            "kv_cache_dtype": dtype,
            "max_model_len": 512,
            "max_num_batched_tokens": 256,
            "attention_backend": "CUSTOM",
            "additional_config": {"sparse_attention": {"maskers": maskers, "min_sparse_keys": 0}},
        }
        calls = [["sparse_attention_stats", []]]
        return {"options": options, "batches": [asked], "calls": calls}

    engines = {
        "dense": engine(SOME, **OFF),
        "everything": engine(EVERYTHING),
        "some": engine(SOME),
        "scaled": engine(EVERYTHING, scaled, "auto"),
    }
    return run_on_cpu(engines, tmp_path_factory.mktemp("engines") / "job")


@pytest.fixture(scope="module")
def answered(model: str) -> Callable[..., Answers]:
    """Tokens and their log-probabilities, by the scales of the layers."""
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    return functools.cache(lambda scales: _answers(reference, scales))


def _answers(reference, scales) -> Answers:
    answers = []
    for prompt in PROMPTS:
        found = reference.generate(
            torch.tensor([prompt]),
            past_key_values=EightBitCache(scales),
            max_new_tokens=TOKENS,
            min_new_tokens=TOKENS,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        tokens = found.sequences[0, len(prompt) :].tolist()
        logits = torch.stack(found.logits)[:, 0].log_softmax(dim=-1)
        answers.append((tokens, logits.gather(1, torch.tensor(tokens)[:, None])[:, 0].tolist()))
    return answers


@pytest.mark.parametrize("name", ["dense", "everything", "scaled"])
def test_the_answers_are_the_reference_s(reports, answered, name: str) -> None:
    found = reports[name]
    scales = SCALES if name == "scaled" else UNSCALED
    for number, (tokens, logprobs) in enumerate(answered(scales)):
        assert found["tokens"][0][number] == tokens
        assert found["logprobs"][0][number] == pytest.approx(logprobs, abs=LOGPROB_ATOL)


def test_some_keys_are_left_out(reports, answered) -> None:
    assert reports["some"]["tokens"][0] != [tokens for tokens, _ in answered(UNSCALED)]
    [counts] = reports["some"]["calls"][0]
    assert counts["general_rows"] == 0
    assert counts["density"] < 0.4
    [counts] = reports["everything"]["calls"][0]
    assert counts["density"] == 1
