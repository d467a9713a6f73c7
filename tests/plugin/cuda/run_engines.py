"""Starts `engines` in a process of its own, with or without the GPU that is not there."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.plugin.cuda.dry_cuda import ENGINE_OPTIONS

_REPOSITORY = Path(__file__).parents[3]
_MINUTES = 10

OPTIONS: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 128,
    "max_num_batched_tokens": 64,
    "max_num_seqs": 4,
    "num_gpu_blocks_override": 96,
    "enable_prefix_caching": False,
    "seed": 0,
}
"""Of any engine here: as little as there can be for an interpreter to compute."""

DRY_OPTIONS: dict[str, Any] = {**OPTIONS, **ENGINE_OPTIONS}


def write_tiny_llama(folder: Path) -> Path:
    """A Llama of two layers with random weights, and no tokenizer."""
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        # Larger than the default, so that attention is not flat and answers differ by what is read.
        initializer_range=0.15,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


def run_engines(engines: list[dict[str, Any]], folder: Path, *, dry: bool) -> list[dict[str, Any]]:
    """What each engine answered; see `engines`.

    Args:
        engines: Of the job.
        folder: For the job's files.
        dry: Whether the process believes in a GPU.

    Raises:
        AssertionError: With the process's output, when it failed.
    """
    job, result = folder / f"job-{dry}.json", folder / f"result-{dry}.json"
    job.write_text(json.dumps({"engines": engines}))
    modules = ["tests.plugin.cuda.engines", str(job), str(result)]
    if dry:
        modules.insert(0, "tests.plugin.cuda.dry_cuda")
    environment = {
        **os.environ,
        "PYTHONPATH": str(_REPOSITORY),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",  # else most of the memory
    }
    with open(folder / f"output-{dry}.txt", "w+") as output:
        command = [sys.executable, "-m", *modules]
        process = subprocess.Popen(
            command, cwd=_REPOSITORY, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            code: int | str = process.wait(timeout=_MINUTES * 60)
        except subprocess.TimeoutExpired:
            process.kill()
            code = f"none after {_MINUTES} minutes"
        output.seek(0)
        assert code == 0, f"{' '.join(modules)}: code {code}\n{output.read()[-20_000:]}"
    answers: list[dict[str, Any]] = json.loads(result.read_text())["engines"]
    return answers
