"""Kinds of models: refused with the reason, or served densely where maskers do not apply."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from sparse_attention_hub.adapters import ModelServerVLLM
from sparse_attention_hub.adapters.utils import ModelServerError
from tests.e2e import start_engines
from tests.e2e.conftest import ENVIRONMENT, REPOSITORY
from tests.e2e.texts import prompt
from tests.e2e.tiny_models import write_tiny_model

REFUSED = {
    "mla": "cannot serve this model: MLA not supported",
    "encoder": "attention type AttentionType.ENCODER_ONLY not supported",
    "sinks": "cannot serve this model: attention sinks not supported",
    "alibi": "ALiBi not supported",
    "softcap": "logits soft cap not supported",
}
SERVED = ("window", "mixed")
LAYERS, HEADS = 2, 2


@pytest.fixture(scope="module")
def prompt_tokens(model_path: str) -> list[int]:
    return prompt(model_path, 900, 200)


@pytest.fixture(scope="module")
def folders(model_path: str, tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {kind: write_tiny_model(kind, root, model_path) for kind in (*REFUSED, *SERVED)}


@pytest.fixture(scope="module")
def reports(folders, prompt_tokens, tmp_path_factory) -> dict[str, dict[str, Any]]:
    report = tmp_path_factory.mktemp("report") / "report.json"
    given = {
        "folders": [str(folder) for folder in folders.values()],
        "prompt": prompt_tokens,
        "report": str(report),
    }
    command = [sys.executable, start_engines.__file__, json.dumps(given)]
    process = subprocess.run(
        command,
        cwd=REPOSITORY,
        env={**os.environ, **ENVIRONMENT},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.returncode == 0, process.stdout[-4000:]
    found = json.loads(report.read_text())
    return {kind: found[str(folder)] for kind, folder in folders.items()}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_with_the_reason(reports, kind: str) -> None:
    assert REFUSED[kind] in reports[kind]["error"]
    assert "--attention-backend CUSTOM" in reports[kind]["error"]


def test_layers_with_a_window_stay_dense(reports) -> None:
    report = reports["window"]
    assert any("2 layers have a sliding window" in line for line in report["log"])
    assert report["answers"]["on"] == report["answers"]["off"]
    assert report["statistics"]["visible_keys"] == 0


def test_the_other_layers_are_sparse(reports, folders, prompt_tokens) -> None:
    """One layer of each kind: the same tokens as transformers' dense model, and sparsely others."""
    report = reports["mixed"]
    assert any("1 layers have a sliding window" in line for line in report["log"])
    model = AutoModelForCausalLM.from_pretrained(folders["mixed"], dtype=torch.float32)
    dense = model.generate(
        torch.tensor([prompt_tokens]), max_new_tokens=24, min_new_tokens=24, do_sample=False
    )[0, len(prompt_tokens) :].tolist()
    assert report["answers"]["off"] == dense
    assert report["answers"]["on"] != dense
    # 23 generated tokens were fed back, each seeing itself and all before; one layer counts.
    visible = sum(range(len(prompt_tokens) + 1, len(prompt_tokens) + 24)) * HEADS
    assert report["statistics"]["visible_keys"] == visible
    assert report["statistics"]["read_keys"] == 23 * (4 + 8) * HEADS


def test_the_reason_reaches_who_starts_a_server(folders) -> None:
    """It arises in the engine's process, and vLLM's own last words do not repeat it."""
    server = ModelServerVLLM(
        str(folders["alibi"]),
        {"maskers": [{"type": "sink", "sink_size": 4}]},
        arguments=["--load-format", "dummy", "--dtype", "float32", "--enforce-eager"],
        environment=ENVIRONMENT,
    )
    with pytest.raises(ModelServerError) as error, server:
        pass
    assert REFUSED["alibi"] in str(error.value)
