"""Runs engines one after the other: `python -m tests.plugin.cuda.engines JOB RESULT`, JSON files.

With `tests.plugin.cuda.dry_cuda` in front, or in a fork of `dry_process`, it does so on the GPU
that is not there. The job:

    {"engines": [{
        "options": {...},       # of vllm.LLM, its model included
        "environment": {...},   # optional: variables that vLLM reads when it builds the engine
        "costs": {...},         # optional: what it finds when it measures steps, see `dry_clock`
        "batches": [[{          # asked one after the other, greedily
            "prompt_token_ids": [...],
            "max_tokens": 6,
            "arrives": 0,       # optional: after so many steps of its batch
            "extra_args": {}    # optional: what a client would send as `vllm_xargs`
        }]],
        "calls": [["method", [arguments]]]  # optional: collective_rpc after the last batch
    }]}

The result has for each engine: `runner`, `platform`, `tokens` and their `logprobs` (batches of
requests), `captured` and `replays` (CUDA graphs), `preemptions`, `prefix_hits` (tokens), `steps`
(of all batches), `calls` (their answers), `costs` (what was found, by engine) and `late` (kernels
that requests had to wait for, see `interpreted_launches.COMPILED`).
"""

import contextlib
import gc
import json
import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

from tests.plugin.cuda.dry_clock import measuring
from tests.plugin.cuda.graphs import DryGraph
from tests.plugin.cuda.interpreted_launches import COMPILED


def run_engine(engine: dict[str, Any]) -> dict[str, Any]:
    """Starts one engine and asks it its batches."""
    from vllm import LLM
    from vllm.platforms import current_platform

    captured = DryGraph.captured
    costs = engine.get("costs")
    with measuring(costs) if costs else contextlib.nullcontext([]) as found:
        llm = LLM(skip_tokenizer_init=True, **engine["options"])
    core: Any = llm.llm_engine.engine_core.engine_core
    runner = type(core.model_executor.driver_worker.worker.model_runner)
    result: dict[str, Any] = {
        "runner": f"{runner.__module__}.{runner.__qualname__}",
        "platform": type(current_platform).__name__,
        "captured": DryGraph.captured - captured,
        "costs": found,
        "tokens": [],
        "logprobs": [],
        "steps": 0,
    }
    replayed, compiled = DryGraph.replayed, set(COMPILED)
    counted = _counted(llm)
    for batch in engine["batches"]:
        answers, steps = _ask(llm.llm_engine, batch)
        result["tokens"].append([list(answer.token_ids) for answer in answers])
        result["logprobs"].append([_logprobs(answer) for answer in answers])
        result["steps"] += steps
    result["replays"] = DryGraph.replayed - replayed
    result["late"] = sorted(COMPILED - compiled)
    after = _counted(llm)
    result["preemptions"] = after["vllm:num_preemptions"] - counted["vllm:num_preemptions"]
    result["prefix_hits"] = after["vllm:prefix_cache_hits"] - counted["vllm:prefix_cache_hits"]
    result["calls"] = [
        llm.collective_rpc(method, args=tuple(args)) for method, args in engine.get("calls", [])
    ]
    return result


def _counted(llm: Any) -> dict[str, int]:
    """Of all engines of the process so far."""
    values = {"vllm:num_preemptions": 0, "vllm:prefix_cache_hits": 0}
    for metric in llm.get_metrics():
        if metric.name in values:
            values[metric.name] += int(metric.value)
    return values


def _ask(engine: Any, batch: list[dict[str, Any]]) -> tuple[list[Any], int]:
    """The answer to each request, and after how many steps all were there."""
    from vllm import SamplingParams

    waiting = dict(enumerate(batch))
    answers: dict[str, Any] = {}
    step = 0
    while waiting or engine.has_unfinished_requests():
        for index in [i for i, request in waiting.items() if request.get("arrives", 0) <= step]:
            request = waiting.pop(index)
            parameters = SamplingParams(
                temperature=0,
                max_tokens=request["max_tokens"],
                ignore_eos=True,
                detokenize=False,
                logprobs=0,  # of the token itself
                extra_args=request.get("extra_args"),
            )
            prompt = {"prompt_token_ids": request["prompt_token_ids"]}
            engine.add_request(str(index), prompt, parameters)
        for output in engine.step():
            if output.finished:
                answers[output.request_id] = output.outputs[0]
        step += 1
    return [answers[str(index)] for index in range(len(batch))], step


def _logprobs(answer: Any) -> list[float]:
    pairs = zip(answer.token_ids, answer.logprobs, strict=True)
    return [found[token].logprob for token, found in pairs]


def main(job: Path, result: Path) -> None:
    engines = []
    for engine in json.loads(job.read_text())["engines"]:
        # vLLM asks for a collection often, of all its modules, where a GPU's memory may be short.
        collects_nothing = mock.patch.object(gc, "collect")
        with collects_nothing, mock.patch.dict(os.environ, engine.get("environment", {})):
            engines.append(run_engine(engine))
        gc.collect()  # the engine is gone, and with it its distributed groups
    result.write_text(json.dumps({"engines": engines}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
