"""Decode throughput of whole engines of the shape of Llama-3.1-8B, dense and sparse.

    python -m benchmarks.gpu.engine_throughput dense --output FOLDER [--quick]
    python -m benchmarks.gpu.engine_throughput sparse-long --output FOLDER [--quick]
    python -m benchmarks.gpu.engine_throughput sparse --output FOLDER [--quick]

One engine per process, since one takes nearly all of the GPU's memory; all with CUDA graphs for
decode steps and without compiling the model. "dense" is vLLM as it is (the plugin is off) with
FlashAttention, at all contexts. "sparse-long" has Quest over pages of 16 keys at 5 %, at the
longest context; "sparse" at 10 %, at the others.

Each request has a prompt of its own, in blocks of its own: requests that share blocks would find
them in the GPU's cache. Prompts are random tokens. They are prefilled densely, once: a request's
prompts at shorter contexts are beginnings of its longest one, and found in the prefix cache. Cells
go from long contexts to short ones. Timed are decode steps alone: from when each request has some
tokens until the first one ends. What does not fit into the KV cache is left out, and said so; so is
what there is no time for: STAGE_SECONDS, if set, says when the process will be ended.
"""

from __future__ import annotations

import json
import logging
import os
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from benchmarks.gpu import cells
from benchmarks.gpu.cells import EngineCell
from benchmarks.gpu.command import run_stage
from benchmarks.gpu.engine_answers import GRAPHS, prepare_environment
from benchmarks.gpu.sparse_configs import quest

logger = logging.getLogger(__name__)

ENGINES = ("dense", "sparse-long", "sparse")
_WARM_UP_TOKENS = 8
"""Of each request, before the clock starts: it then has its graph, and the pipeline is full."""
_SPARE_SECONDS = 40
"""Before a stage's limit: for the cell that was begun last, so that the others' are written."""


@dataclass(frozen=True)
class Run:
    """How an engine is measured.

    Attributes:
        engine: One of `ENGINES`.
        cells: Of which.
        tokens: Of each request, that are timed.
        rounds: Of each cell.
        model: Configuration of the model.
        options: Of `vllm.LLM`.
        seconds: After which no new cell is begun.
        min_sparse_keys: Of the server.
    """

    engine: str
    cells: tuple[EngineCell, ...]
    tokens: int
    rounds: int
    model: dict[str, Any]
    options: dict[str, Any]
    seconds: float
    min_sparse_keys: int | Literal["auto"] = "auto"

    @property
    def is_sparse(self) -> bool:
        """Whether the plugin is on."""
        return self.engine.startswith("sparse")

    @property
    def density(self) -> float:
        """Of a sparse engine's maskers."""
        return 0.05 if self.engine.endswith("long") else 0.1


def gpu_run(engine: str, is_quick: bool) -> Run:
    """On a GPU.

    Args:
        engine: One of `ENGINES`.
        is_quick: Fewer cells.
    """
    short, long = (cells.QUICK, cells.LONG[:1]) if is_quick else (cells.SHORT, cells.LONG)
    chosen = {"dense": (*short, *long), "sparse-long": long, "sparse": short}[engine]
    most = max(cell.requests for cell in chosen)
    options = {
        "dtype": "bfloat16",
        "load_format": "dummy",
        "max_model_len": max(cell.keys for cell in chosen) + 1024,
        "max_num_seqs": most,
        "max_num_batched_tokens": 16384,
        "gpu_memory_utilization": 0.92,
        "compilation_config": GRAPHS
        | {"cudagraph_capture_sizes": [n for n in (1, 2, 4, 6, 8, 16, 32, 64) if n <= most]},
    }
    # Rounds vary by less than a percent.
    return Run(engine, chosen, 48, 2, cells.LLAMA_8B, options, 420)


def dry_run(engine: str) -> Run:
    """On a CPU: a tiny model, to see that everything runs."""
    small = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    model = cells.LLAMA_8B | small | heads | {"max_position_embeddings": 1024}
    options = {
        "dtype": "float32",
        "load_format": "dummy",
        "max_model_len": 1024,
        "max_num_seqs": 4,
        "enforce_eager": True,
        "num_gpu_blocks_override": 32,
    }
    return Run(
        engine,
        (EngineCell(512, 1), EngineCell(512, 4), EngineCell(128, 4)),
        8,
        1,
        model,
        options,
        60,
        min_sparse_keys=256,
    )


def seconds_to_begin(run: Run) -> float:
    """After which no new cell is begun: the run's, less where the stage's limit is sooner."""
    limit = os.environ.get("STAGE_SECONDS")
    return min(run.seconds, max(0.0, float(limit) - _SPARE_SECONDS)) if limit else run.seconds


def start(run: Run, folder: Path, device: str) -> Any:
    """The engine.

    Args:
        run: How.
        folder: For the model's configuration.
        device: "cuda" or "cpu".
    """
    if not run.is_sparse:
        os.environ["SPARSE_ATTENTION_PLUGIN_DISABLED"] = "1"
    from vllm import LLM

    (folder / "config.json").write_text(json.dumps(run.model))
    options = dict(run.options)
    if run.is_sparse:
        keys = max(cell.keys for cell in run.cells)
        options["attention_backend"] = "CUSTOM"
        config = {"maskers": quest(keys, run.density), "min_sparse_keys": run.min_sparse_keys}
        options["additional_config"] = {"sparse_attention": config}
    elif device == "cuda":
        options["attention_backend"] = "FLASH_ATTN"
    return LLM(str(folder), skip_tokenizer_init=True, seed=0, **options)


class Decoder:
    """Measures cells on an engine."""

    def __init__(self, run: Run, engine: Any) -> None:
        """Makes the prompts.

        Args:
            run: How.
            engine: A `vllm.LLM`.
        """
        self._run, self._engine, self._core = run, engine, engine.llm_engine
        most, longest = (max(getattr(c, name) for c in run.cells) for name in ("requests", "keys"))
        random = np.random.default_rng(0)
        self._prompts = random.integers(3, run.model["vocab_size"], (most, longest), np.int32)
        self._asked = 0

    def capacity(self) -> int | None:
        """Tokens that fit into the KV cache, if the engine says."""
        cache = self._core.vllm_config.cache_config
        blocks, size = cache.num_gpu_blocks, cache.block_size
        return None if blocks is None else int(blocks) * int(size)

    def ask(self, cell: EngineCell, tokens: int) -> tuple[float, int, int]:
        """Answers to all of a cell's requests.

        Args:
            cell: Of which.
            tokens: Of each answer.

        Returns:
            Seconds while all were decoded together, tokens in that time, and steps.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        extra = {"sparse_attention_tag": self._tag(cell)} if self._run.is_sparse else None
        for row in range(cell.requests):
            parameters = SamplingParams(
                temperature=0,
                max_tokens=tokens,
                detokenize=False,
                ignore_eos=True,
                output_kind=RequestOutputKind.DELTA,
                extra_args=extra,
            )
            prompt = {"prompt_token_ids": self._prompts[row, : cell.keys].tolist()}
            self._core.add_request(f"{self._asked}-{row}", prompt, parameters)
        self._asked += 1
        counts: dict[str, int] = {}
        begun: float | None = None
        counted, steps = 0, 0
        while self._core.has_unfinished_requests():
            outputs = self._core.step()
            now = time.perf_counter()
            new = 0
            for output in outputs:
                size = len(output.outputs[0].token_ids)
                counts[output.request_id] = counts.get(output.request_id, 0) + size
                new += size
            if begun is not None:
                counted, steps = counted + new, steps + (new > 0)
                if any(output.finished for output in outputs):
                    return self._finish(now - begun, counted, steps)
            elif len(counts) == cell.requests and min(counts.values()) >= _WARM_UP_TOKENS:
                begun = now
        return 0.0, 0, 0

    def _finish(self, seconds: float, tokens: int, steps: int) -> tuple[float, int, int]:
        while self._core.has_unfinished_requests():
            self._core.step()
        return seconds, tokens, steps

    @staticmethod
    def _tag(cell: EngineCell) -> str:
        return cell.name.replace(" ", "")

    def measure(self, cell: EngineCell) -> dict[str, Any]:
        """A cell's record."""
        started = time.perf_counter()
        self.ask(cell, 1)
        prefilled = time.perf_counter() - started
        rates, step_times = [], []
        for _ in range(self._run.rounds):
            seconds, tokens, steps = self.ask(cell, _WARM_UP_TOKENS + self._run.tokens)
            rates.append(tokens / seconds)
            step_times.append(seconds / steps)
        record: dict[str, Any] = {
            "keys": cell.keys,
            "requests": cell.requests,
            "tokens_per_second": statistics.median(rates),
            "rounds": rates,
            "step_milliseconds": 1e3 * statistics.median(step_times),
            "prefill_seconds": prefilled,
        }
        if self._run.is_sparse:
            [counts] = self._engine.collective_rpc(
                "sparse_attention_stats", args=(self._tag(cell),)
            )
            record["counts"] = counts
        return record


def measure(run: Run, device: str) -> dict[str, Any]:
    """All cells of one engine.

    Args:
        run: How.
        device: "cuda" or "cpu".
    """
    started = time.perf_counter()
    allowed = seconds_to_begin(run)
    records: list[dict[str, Any]] = []
    failures: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        engine = start(run, Path(name), device)
        decoder = Decoder(run, engine)
        startup = time.perf_counter() - started
        capacity = decoder.capacity()
        # Longest first: what is shorter is then in the prefix cache. Few requests first: theirs are
        # the first of more.
        for cell in sorted(run.cells, key=lambda cell: (-cell.keys, cell.requests)):
            record: dict[str, Any] = {"keys": cell.keys, "requests": cell.requests}
            needed = cell.requests * (cell.keys + run.tokens + 64)
            if capacity is not None and needed > capacity:
                record["left_out"] = f"{needed} tokens do not fit into {capacity}"
            elif time.perf_counter() - started > allowed:
                record["left_out"] = f"{allowed:.0f} seconds were over"
            else:
                try:
                    record = decoder.measure(cell)
                    rate = record["tokens_per_second"]
                    logger.info("%s, %s: %.1f tokens/s", run.engine, cell.name, rate)
                except Exception as error:  # said in the report
                    logger.exception("%s, %s", run.engine, cell.name)
                    failures.append(f"{cell.name}: {type(error).__name__}: {error}"[:500])
                    break  # an engine that has failed is not asked again
            records.append(record)
        compilation = engine.llm_engine.vllm_config.compilation_config
        return {
            "engine": run.engine,
            "density": run.density if run.is_sparse else 1.0,
            "startup_seconds": startup,
            "capacity_tokens": capacity,
            "cudagraph_mode": str(compilation.cudagraph_mode),
            "records": records,
            "failures": failures,
        }


def stage(device: str, is_quick: bool, variant: str) -> dict[str, Any]:
    """The stage's result; see `command.run_stage`."""
    prepare_environment(is_float32=False)
    run = dry_run(variant) if device == "cpu" else gpu_run(variant, is_quick)
    return measure(run, device)


if __name__ == "__main__":
    run_stage("engine", __doc__ or "", stage, ENGINES)
