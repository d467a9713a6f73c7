"""Starts an engine in this process, asks it while it runs, and compares what two engines answer."""

from __future__ import annotations

import gc
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

GRAPHS: dict[str, Any] = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
"""CUDA graphs of decode steps, without compiling the model."""


@dataclass(frozen=True)
class Asked:
    """A greedy request.

    Attributes:
        name: Of it; its tag in the plugin's statistics.
        prompt: Token ids.
        tokens: Of the answer.
        parameters: What a client would send as `vllm_xargs`.
        start: The engine's step before which it comes.
    """

    name: str
    prompt: list[int]
    tokens: int
    parameters: dict[str, Any] = field(default_factory=dict)
    start: int = 0


@dataclass(frozen=True)
class Answered:
    """An answer.

    Attributes:
        token_ids: Of it.
        logprobs: Of each token.
        gaps: By how much each token's logprob is above that of the next best one.
        counts: The plugin's statistics of the request; None where there is no plugin.
    """

    token_ids: list[int]
    logprobs: list[float]
    gaps: list[float]
    counts: dict[str, Any] | None

    def to_dict(self) -> dict[str, Any]:
        """For a JSON file."""
        return asdict(self)


def prepare_environment(is_float32: bool = True) -> None:
    """Before vLLM is imported: one process, and nothing from a network.

    Args:
        is_float32: Whether engines compute in it.
    """
    for name, value in {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }.items():
        os.environ.setdefault(name, value)
    if is_float32:
        # Triton's own default rounds float32s to 10 bits before it multiplies them.
        os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")
        # FlashAttention has no float32.
        os.environ.setdefault("SPARSE_ATTENTION_DENSE_BACKEND", "TRITON_ATTN")


def small_engine(folder: str, maskers: list[dict[str, Any]], device: str, **options: Any) -> Any:
    """An engine with the plugin on a small model, in float32.

    Args:
        folder: Of the model.
        maskers: Of the server.
        device: "cuda" or "cpu".
        options: Of `vllm.LLM`, besides.
    """
    from vllm import LLM

    if device == "cuda":
        # Given, not found out: the GPU may be another engine's too.
        options |= {"gpu_memory_utilization": 0.1, "kv_cache_memory_bytes": 256 << 20}
    return LLM(
        folder,
        dtype="float32",
        skip_tokenizer_init=True,
        max_model_len=1024,
        max_num_seqs=8,
        seed=0,
        enable_prefix_caching=False,
        num_gpu_blocks_override=1024 if device == "cuda" else 128,
        attention_backend="CUSTOM",
        additional_config={"sparse_attention": {"maskers": maskers, "min_sparse_keys": 0}},
        **options,
    )


def answers(engine: Any, asked: Sequence[Asked]) -> dict[str, Answered]:
    """What the engine says, by the requests' names.

    Args:
        engine: A `vllm.LLM`.
        asked: Some of them come while others are answered.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    waiting = sorted(asked, key=lambda request: request.start)
    found, step, core = {}, 0, engine.llm_engine
    while waiting or core.has_unfinished_requests():
        # Where nobody is left to wait for, the next one need not wait either.
        while waiting and (waiting[0].start <= step or not core.has_unfinished_requests()):
            request = waiting.pop(0)
            parameters = SamplingParams(
                temperature=0,
                max_tokens=request.tokens,
                detokenize=False,
                logprobs=2,
                ignore_eos=True,
                output_kind=RequestOutputKind.FINAL_ONLY,
                extra_args={**request.parameters, "sparse_attention_tag": request.name},
            )
            core.add_request(request.name, {"prompt_token_ids": request.prompt}, parameters)
        for output in core.step():
            if output.finished:
                found[output.request_id] = _answered(engine, output)
        step += 1
    return {request.name: found[request.name] for request in asked}


def _answered(engine: Any, output: Any) -> Answered:
    token_ids, logprobs, gaps = list(output.outputs[0].token_ids), [], []
    for token, best in zip(token_ids, output.outputs[0].logprobs, strict=True):
        own = best[token].logprob
        logprobs.append(round(own, 6))
        gaps.append(round(own - max(p.logprob for t, p in best.items() if t != token), 6))
    [counts] = engine.collective_rpc("sparse_attention_stats", args=(output.request_id,))
    return Answered(token_ids, logprobs, gaps, counts)


@dataclass(frozen=True)
class Comparison:
    """Of two answers.

    Attributes:
        differs_at: The first token that differs; None: none does.
        gap: Of the expected token there.
        logprob_error: The largest difference of logprobs before it.
        problem: What is wrong; None: nothing, or two tokens were as good as equal.
    """

    differs_at: int | None
    gap: float | None
    logprob_error: float
    problem: str | None


def compare(expected: Answered, found: Answered, tolerance: float) -> Comparison:
    """Whether two answers are the same up to float noise.

    Args:
        expected: From one engine.
        found: From another.
        tolerance: Of logprobs. Tokens may differ where the expected one is ahead by less than twice
            as much; what follows then is of another text and is not compared.
    """
    pairs = list(zip(expected.token_ids, found.token_ids, strict=False))
    differs_at = next((i for i, (left, right) in enumerate(pairs) if left != right), None)
    end = len(pairs) if differs_at is None else differs_at
    error = max(
        (abs(a - b) for a, b in zip(expected.logprobs[:end], found.logprobs[:end], strict=True)),
        default=0.0,
    )
    gap = None if differs_at is None else expected.gaps[differs_at]
    problem = None
    if error > tolerance:
        problem = f"logprobs differ by {error:.4f}"
    elif gap is not None and gap > 2 * tolerance:
        problem = f"token {differs_at} is another, though the expected one was ahead by {gap:.4f}"
    elif len(expected.token_ids) != len(found.token_ids):
        problem = f"{len(found.token_ids)} tokens instead of {len(expected.token_ids)}"
    else:
        problem = _other_counts(expected.counts, found.counts, is_same_text=differs_at is None)
    return Comparison(differs_at, gap, error, problem)


def _other_counts(
    expected: dict[str, Any] | None, found: dict[str, Any] | None, is_same_text: bool
) -> str | None:
    """Why the plugin's counts are not those of the same work; None: they are."""
    if expected is None or found is None:
        return None if expected is found else "one engine has no statistics"
    if expected["sparse_queries"] != found["sparse_queries"]:
        return f"{found['sparse_queries']} sparse queries, not {expected['sparse_queries']}"
    if expected["general_rows"] != found["general_rows"]:
        return f"{found['general_rows']} rows on the general path, not {expected['general_rows']}"
    for name in ("read_keys", "visible_keys") if is_same_text else ("visible_keys",):
        # A selection is a page more here or there when two scores tie within float noise.
        if abs(expected[name] - found[name]) > 0.02 * expected[name]:
            return f"{name} is {found[name]}, not {expected[name]}"
    return None


def let_go(engine: Any) -> None:
    """Gives an engine's memory back, before the next one starts in the same process."""
    shutdown = getattr(engine.llm_engine.engine_core, "shutdown", None)
    if shutdown is not None:
        shutdown()
    del engine
    gc.collect()
