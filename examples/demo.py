"""A real model under `vllm serve` with sparse attention, beside the in-process reference.

Starts a server with the plugin, asks questions about a long document densely and sparsely on the
same server with the OpenAI client, asks the HuggingFace reference the same, and prints a table.
Exits with a status other than 0 when anything is wrong.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import textwrap
from dataclasses import dataclass

import torch
from tqdm import tqdm

from examples.documents import LONG_DOCUMENT
from examples.small_model import ensure_small_model
from sparse_attention_hub import ModelAdapter, ModelAdapterHF, ModelAdapterVLLM, Request
from sparse_attention_hub.adapters.base import AnswerDetails, Mode
from sparse_attention_hub.adapters.comparison import Comparison, compare_answers
from sparse_attention_hub.sparse_attention import (
    LocalMaskerConfig,
    OracleTopKConfig,
    ResearchAttentionConfig,
    SinkMaskerConfig,
)
from sparse_attention_hub.sparse_attention.serialization import config_to_json

MASKERS = ResearchAttentionConfig(
    [
        SinkMaskerConfig(sink_size=64),
        LocalMaskerConfig(window_size=64),
        OracleTopKConfig(heavy_size=0.05),
    ]
)
MIN_CONTEXT_TOKENS = 3000
SERVER_ARGUMENTS = ["--dtype", "float32", "--max-num-seqs", "4", "--enforce-eager"]
MODES: tuple[Mode, ...] = ("dense", "sparse")


@dataclass(frozen=True)
class Row:
    """One answer of the server, with what the reference says about it."""

    question: str
    mode: Mode
    text: str
    served: AnswerDetails
    reference: AnswerDetails
    comparison: Comparison

    def problems(self) -> list[str]:
        """What is wrong with it."""
        found = []
        if not (self.comparison.is_equal or self.comparison.is_near_tie):
            found.append(f"tokens differ from the reference's: {self.comparison}")
        if self.served.context_tokens < MIN_CONTEXT_TOKENS:
            found.append(f"the context has only {self.served.context_tokens} tokens")
        counts = [(item.read_keys, item.visible_keys) for item in (self.served, self.reference)]
        if self.comparison.is_equal and counts[0] != counts[1]:
            found.append(f"read and visible keys {counts[0]}, the reference counts {counts[1]}")
        density = self.served.density
        if density is None or (density == 1.0) != (self.mode == "dense"):
            found.append(f"density {density} in {self.mode} mode")
        return found


def ask(
    adapter: ModelAdapter, request: Request, mode: Mode, tokens: int
) -> list[tuple[str, AnswerDetails]]:
    """Each question's answer, with its details."""
    generation = {"max_new_tokens": tokens}
    extra = {"return_logits": True} if isinstance(adapter, ModelAdapterHF) else None
    if mode == "sparse":
        with adapter.enable_sparse_mode():
            response = adapter.process_request(request, generation, extra)
    else:
        response = adapter.process_request(request, generation, extra)
    return list(zip(response.responses, response.details, strict=True))


def run(model: str, tokens: int) -> list[Row]:
    """Asks the server and the reference, and pairs their answers."""
    document = LONG_DOCUMENT
    request = Request(document.text, list(document.questions))
    steps = tqdm(total=6, bar_format="[{n_fmt}/{total_fmt}] {desc} ({elapsed})", file=sys.stderr)

    def step(what: str) -> None:
        steps.set_description_str(what)
        steps.update()

    step("starting vllm serve with the plugin (about a minute)")
    server_kwargs = {
        "arguments": SERVER_ARGUMENTS,
        "environment": {"VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1")},
    }
    with ModelAdapterVLLM(model, MASKERS, server_kwargs=server_kwargs) as served:
        step("prefilling the document, once")
        warm_up = ask(served, Request(document.text, [document.questions[0]]), "dense", 1)
        answers = {}
        for mode in MODES:
            step(f"asking the server, {mode}")
            answers[mode] = ask(served, request, mode, tokens)
    step("loading the reference and asking it, dense and sparse")
    with ModelAdapterHF(model, MASKERS, model_kwargs={"dtype": torch.float32}) as reference:
        expected = {mode: ask(reference, request, mode, tokens) for mode in MODES}
    step("comparing")
    steps.close()
    prefill = warm_up[0][1]
    print(
        f"\n{model}, float32, {prefill.context_tokens} tokens of context, prefilled once in "
        f"{prefill.time_to_first_token_s:.1f} s; then:\n"
    )
    return [
        Row(
            question.strip(),
            mode,
            text,
            item,
            reference_item,
            compare_answers(reference_item, item),
        )
        for index, question in enumerate(document.questions)
        for mode in MODES
        for text, item in [answers[mode][index]]
        for _, reference_item in [expected[mode][index]]
    ]


def print_table(rows: list[Row]) -> None:
    """One block per answer."""
    print(f"{'mode':8}{'density':>9}{'first token':>13}{'per token':>11}  tokens vs reference")
    question = None
    for row in rows:
        if row.question != question:
            question = row.question
            print(f"\n  Q: {question}")
        item = row.served
        print(
            f"{row.mode:8}{item.density or 0:>9.1%}{item.time_to_first_token_s or 0:>11.2f} s"
            f"{(item.time_per_output_token_s or 0) * 1000:>8.0f} ms  {row.comparison}"
        )
        print(textwrap.indent(textwrap.fill(" ".join(row.text.split()), 92), "     "))


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", help="name or folder; default: SmolLM2-135M-Instruct")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("examples").setLevel(logging.INFO)
    # Its warning about dense runs of a sparse adapter: here they are what is asked for.
    logging.getLogger("sparse_attention_hub.adapters.base").setLevel(logging.ERROR)
    # So that `finally` blocks run: the server is stopped on this signal too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    model = arguments.model or str(ensure_small_model())
    rows = run(model, arguments.max_new_tokens)
    print_table(rows)
    problems = [f"{row.mode}, {row.question!r}: {text}" for row in rows for text in row.problems()]
    for problem in problems:
        print(f"WRONG: {problem}", file=sys.stderr)
    print(f"\nmaskers of the sparse rows: {config_to_json(MASKERS)}")
    print(
        "The oracle among them looks at every key to find the best ones: it shows that the answers "
        "are right, and how few keys they need.\nTo be fast, choose by an index: the preset "
        '"balanced".'
    )
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
