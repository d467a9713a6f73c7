"""Runs the masker of `examples.own_masker` in process, and served by vLLM: the same answer.

python -m examples.serve_own_masker [--model NAME] [--characters N]
"""

from __future__ import annotations

import argparse

import torch

import examples.own_masker  # noqa: F401  # registers the masker
from examples.documents import LONG_DOCUMENT
from examples.small_model import ensure_small_model
from sparse_attention_hub import ModelAdapterHF, ModelAdapterVLLM, Request
from sparse_attention_hub.adapters import ModelServerVLLM
from sparse_attention_hub.sparse_attention.serialization import config_from_dict


def main(arguments: list[str] | None = None) -> None:
    """Prints the answer in process and the answer of a server."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="left out = a small real model")
    parser.add_argument("--characters", type=int, help="of the document; left out = all of it")
    options = parser.parse_args(arguments)
    model = options.model or str(ensure_small_model())
    maskers = {
        "maskers": [
            {"type": "sink", "sink_size": 4},
            {"type": "local", "window_size": 256},
            {"type": "strided", "stride": 4},
        ]
    }
    config = config_from_dict(maskers)
    request = Request(LONG_DOCUMENT.text[: options.characters], list(LONG_DOCUMENT.questions[:1]))
    generation = {"max_new_tokens": 16}
    with ModelAdapterHF(
        model, config, model_kwargs={"dtype": torch.float32}, sparse_by_default=True
    ) as adapter:
        answers = {"in process": adapter.process_request(request, generation)}
    with ModelServerVLLM(
        model,
        {**maskers, "imports": ["examples.own_masker"]},
        arguments=["--dtype", "float32", "--enforce-eager"],
        environment={"VLLM_CPU_KVCACHE_SPACE": "1"},  # GiB; a GPU takes no notice
    ) as server:
        served = ModelAdapterVLLM(model, config, base_url=server.base_url, sparse_by_default=True)
        answers["served"] = served.process_request(request, generation)
    for name, response in answers.items():
        detail = response.details[0]
        print(f"{name}, density {detail.density:.3f}: {response.responses[0]!r}")


if __name__ == "__main__":
    main()
