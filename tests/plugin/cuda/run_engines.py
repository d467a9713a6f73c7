"""Starts `engines` in a process of its own, with or without the GPU that is not there."""

import json
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self
from unittest import mock

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig

from tests.plugin.cuda.dry_cuda import ENGINE_OPTIONS

_REPOSITORY = Path(__file__).parents[3]
_MINUTES = 10
_POLL_S = 0.1
_DRY = multiprocessing.get_context("forkserver")
_DRY.set_forkserver_preload(["tests.plugin.cuda.dry_process"])

OPTIONS: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 128,
    "max_num_batched_tokens": 64,
    "max_num_seqs": 4,
    "num_gpu_blocks_override": 96,
    "enable_prefix_caching": False,
    "disable_log_stats": False,
    "enforce_eager": True,  # else torch compiles the model for the CPU, longer than all the rest
    "seed": 0,
}
"""Of any engine here: as little as there can be for an interpreter to compute."""

DRY_OPTIONS: dict[str, Any] = {**OPTIONS, **ENGINE_OPTIONS, "enforce_eager": False}
"""Graphs are captured, if a test does not say otherwise; nothing is compiled."""


SHAPE: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    # Larger than the default, so that attention is not flat and answers differ by what is read.
    "initializer_range": 0.15,
}
"""Of any tiny model."""


def write_model(config: PretrainedConfig, folder: Path) -> Path:
    """A model with random weights, and no tokenizer."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("sinks"):  # they begin at 0
                parameter.normal_(mean=3.0)
    model.save_pretrained(folder)
    return folder


def write_tiny_llama(folder: Path) -> Path:
    """A Llama of two layers."""
    config = LlamaConfig(**SHAPE, intermediate_size=256, num_hidden_layers=2, head_dim=64)
    return write_model(config, folder)


def run_both(
    on_cpu: dict[Any, dict[str, Any]], dry: dict[Any, dict[str, Any]], folder: Path
) -> tuple[dict[Any, dict[str, Any]], dict[Any, dict[str, Any]]]:
    """What engines answered on the CPU, and others on the GPU that is not there; by their keys.

    The dry ones, which take the time, share two processes: CI has two cores.

    Args:
        on_cpu: Engines of a job.
        dry: Likewise.
        folder: For the jobs' files.

    Raises:
        AssertionError: With a process's output, when it failed.
    """
    halves: list[dict[Any, dict[str, Any]]] = [{}, {}]
    for key, engine in sorted(dry.items(), key=lambda item: -_tokens_of(item[1])):
        lighter = min(halves, key=lambda half: sum(map(_tokens_of, half.values())))
        lighter[key] = engine
    jobs = [(on_cpu, False), *((half, True) for half in halves)]
    with ExitStack() as ends:
        started = [
            ends.enter_context(_Process(list(job.values()), folder / f"job-{number}", dry=is_dry))
            for number, (job, is_dry) in enumerate(jobs)
        ]
        answers = [
            dict(zip(job, found, strict=True))
            for (job, _), found in zip(jobs, _answers_of(started), strict=True)
        ]
    return answers[0], answers[1] | answers[2]


def run_on_cpu(
    engines: dict[Any, dict[str, Any]], files: Path, **variables: str
) -> dict[Any, dict[str, Any]]:
    """What engines answered on the CPU, by their keys.

    Args:
        engines: Of the job.
        files: Beginning of the paths of its files.
        variables: Of the environment of its process.

    Raises:
        AssertionError: With the process's output, when it failed.
    """
    with _Process(list(engines.values()), files, dry=False, **variables) as process:
        [answers] = _answers_of([process])
        return dict(zip(engines, answers, strict=True))


def _tokens_of(engine: dict[str, Any]) -> int:
    """That an engine computes, about: how long it takes."""
    requests = [request for batch in engine["batches"] for request in batch]
    return sum(len(one["prompt_token_ids"]) // 8 + one["max_tokens"] for one in requests)


def run_ranks(engine: dict[str, Any], folder: Path, ranks: int) -> list[dict[str, Any]]:
    """What the ranks of a tensor parallel engine answered, each in a process that has a GPU.

    Args:
        engine: Of the job.
        folder: For the job's files.
        ranks: How many.

    Raises:
        AssertionError: With a process's output, when it failed.
    """
    options = {
        **engine["options"],
        "tensor_parallel_size": ranks,
        "distributed_executor_backend": "external_launcher",
        "disable_custom_all_reduce": True,
    }
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with ExitStack() as ends:
        processes = [
            ends.enter_context(
                _Process(
                    [{**engine, "options": options}],
                    folder / f"rank-{rank}",
                    dry=True,
                    RANK=str(rank),
                    LOCAL_RANK="0",  # each has a machine of its own
                    WORLD_SIZE=str(ranks),
                    MASTER_ADDR="127.0.0.1",
                    MASTER_PORT=str(port),
                    GLOO_SOCKET_IFNAME="lo",
                )
            )
            for rank in range(ranks)
        ]
        return [answers for [answers] in _answers_of(processes)]


class _Process:
    """Engines in a process of their own, which ends with the context, whatever it still does.

    So no other one goes on, or waits for this one, after one has failed.
    """

    def __init__(
        self, engines: list[dict[str, Any]], files: Path, *, dry: bool, **variables: str
    ) -> None:
        """Starts it.

        Args:
            engines: Of the job.
            files: Beginning of the paths of its files.
            dry: Whether it believes in a GPU.
            variables: Of its environment.
        """
        self._job, self._result = files.with_suffix(".job.json"), files.with_suffix(".json")
        self._output = files.with_suffix(".txt")
        self._job.write_text(json.dumps({"engines": engines}))
        start = self._start_dry if dry else self._start_on_cpu
        self._code, self._kill = start(variables)

    def _start_dry(self, variables: dict[str, str]) -> "_Handles":
        process = _DRY.Process(
            target=run_dry_job, args=(self._job, self._result, self._output, variables)
        )
        with mock.patch.dict(os.environ, PYTHONPATH=str(_REPOSITORY)):  # of the one that forks
            process.start()
        return lambda: process.exitcode, process.kill

    def _start_on_cpu(self, variables: dict[str, str]) -> "_Handles":
        environment = {
            **os.environ,
            "PYTHONPATH": str(_REPOSITORY),
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "OMP_NUM_THREADS": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",  # else most of the memory
            **variables,
        }
        with open(self._output, "w") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.plugin.cuda.engines", self._job, self._result],
                cwd=_REPOSITORY,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        return process.poll, process.kill

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._kill()  # of no effect after its end
        while self.code is None:
            time.sleep(_POLL_S)

    @property
    def code(self) -> int | None:
        """That it ended with; None while it runs."""
        return self._code()

    def answers(self) -> list[dict[str, Any]]:
        """When it has ended.

        Raises:
            AssertionError: With its output, when it failed.
        """
        code = self.code
        text = self._output.read_text() if self._output.exists() else ""
        assert code == 0, f"{self._job}: code {code}, {_MINUTES} minutes at most\n{text[-20_000:]}"
        answers: list[dict[str, Any]] = json.loads(self._result.read_text())["engines"]
        return answers


_Handles = tuple[Callable[[], int | None], Callable[[], None]]
"""That say what a process ended with, None while it runs, and that end it."""


def _answers_of(processes: Sequence[_Process]) -> list[list[dict[str, Any]]]:
    """Of all; where one fails, others may wait for it and say nothing of why.

    Raises:
        AssertionError: With the output of the first that failed, or of one that takes too long.
    """
    latest = time.monotonic() + _MINUTES * 60
    while time.monotonic() < latest:
        codes = [process.code for process in processes]
        if any(codes) or None not in codes:
            break
        time.sleep(_POLL_S)
    by_end = sorted(processes, key=lambda process: not process.code)  # failed ones first
    found = {process: process.answers() for process in by_end}
    return [found[process] for process in processes]


def run_dry_job(job: Path, result: Path, output: Path, variables: dict[str, str]) -> None:
    """In a fork of the process that has imported `dry_process`, which this one must not import."""
    from tests.plugin.cuda import dry_process

    dry_process.run_job(job, result, output, variables)
