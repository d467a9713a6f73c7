"""Runs in a process of its own: one engine after the other, each asked and let go.

One process for all of them, since importing vLLM takes longer than starting a tiny model.
"""

import gc
import logging
import os
from dataclasses import dataclass, field
from typing import Any
from unittest import mock


@dataclass(frozen=True)
class Asked:
    """One greedy request.

    Attributes:
        prompt: Token ids.
        parameters: What a client would send as `vllm_xargs`.
        tokens: Most tokens of the answer.
        ignore_eos: Whether it goes on after an end-of-sequence token.
    """

    prompt: list[int]
    parameters: dict[str, Any]
    tokens: int = 24
    ignore_eos: bool = False


@dataclass(frozen=True)
class Answered:
    """The answer to one request, its tokens' log-probabilities, and the plugin's counts for it."""

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str
    statistics: dict[str, Any] | None


@dataclass
class EngineReport:
    """What one engine did: why it did not start, or what it logged and answered."""

    error: str | None = None
    block_size: int | None = None
    log: list[str] = field(default_factory=list)
    answers: dict[str, Answered] = field(default_factory=dict)


class _Collector(logging.Handler):
    """Keeps the plugin's own log messages."""

    def __init__(self, messages: list[str]) -> None:
        super().__init__()
        self._messages = messages

    def emit(self, record: logging.LogRecord) -> None:
        self._messages.append(record.getMessage())


def set_environment(variables: dict[str, str]) -> None:
    """Before vLLM is imported: the engine runs in this process, where its log can be read.

    On one thread: with tensors this small, threads would do little but wait for each other.
    """
    os.environ.update(variables, VLLM_ENABLE_V1_MULTIPROCESSING="0", OMP_NUM_THREADS="1")


def run_engine(
    folder: str, maskers: list[dict[str, Any]], asked: dict[str, Asked], options: dict[str, Any]
) -> EngineReport:
    """Starts an engine with the plugin and asks it, one request after the other.

    Args:
        folder: Of the model; without weights in it they are random.
        maskers: The server's configuration.
        asked: By the names that their answers get.
        options: Of vLLM's engine, besides; in "sparse_attention", more of the configuration.
    """
    from vllm.model_executor.models import registry

    # vLLM asks for eight collections, of all its modules: two thirds of a tiny engine's start. And
    # it looks at each architecture in a process of its own, which imports vLLM anew.
    with (
        mock.patch.object(gc, "collect"),
        mock.patch.object(registry, "_run_in_subprocess", lambda look: look()),
    ):
        report = _run_engine(folder, maskers, asked, options)
    gc.collect()
    return report


def _run_engine(
    folder: str, maskers: list[dict[str, Any]], asked: dict[str, Asked], options: dict[str, Any]
) -> EngineReport:
    from vllm import LLM, SamplingParams

    report, options = EngineReport(), dict(options)
    config = {"maskers": maskers, "min_sparse_keys": 0, **options.pop("sparse_attention", {})}
    collector = _Collector(report.log)
    logger = logging.getLogger("vllm_sparse_plugin")
    logger.addHandler(collector)
    has_weights = any(name.endswith(".safetensors") for name in os.listdir(folder))
    try:
        engine = LLM(
            folder,
            load_format="auto" if has_weights else "dummy",
            dtype="float32",
            enforce_eager=True,
            skip_tokenizer_init=True,
            num_gpu_blocks_override=64,  # clearing a whole GB takes as long as all the rest
            max_model_len=512,
            max_num_seqs=4,
            attention_backend="CUSTOM",
            additional_config={"sparse_attention": config},
            **options,
        )
        report.block_size = engine.llm_engine.vllm_config.cache_config.block_size
        for name, request in asked.items():
            parameters = SamplingParams(
                temperature=0,
                max_tokens=request.tokens,
                detokenize=False,
                logprobs=0,  # of the token itself
                ignore_eos=request.ignore_eos,
                extra_args={**request.parameters, "sparse_attention_tag": name},
            )
            prompt = {"prompt_token_ids": request.prompt}
            output = engine.generate(prompt, parameters, use_tqdm=False)[0].outputs[0]
            report.answers[name] = Answered(
                token_ids=list(output.token_ids),
                logprobs=[
                    found[token].logprob
                    for token, found in zip(output.token_ids, output.logprobs, strict=True)
                ],
                finish_reason=str(output.finish_reason),
                statistics=engine.collective_rpc("sparse_attention_stats", args=(name,))[0],
            )
        del engine
    except ValueError as error:
        report.error = str(error)
    finally:
        logger.removeHandler(collector)
    return report
