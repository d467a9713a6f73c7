"""Composes maskers on a model, and asks it a question densely and sparsely.

    python -m examples.compose_maskers [--model NAME] [--characters N] [--new-tokens 32]

Sinks, a window, pages of heavy hitters and a sample of the rest; the first two layers stay dense.
"""

from __future__ import annotations

import argparse

from examples.documents import LONG_DOCUMENT
from examples.small_model import ensure_small_model
from sparse_attention_hub import ModelAdapterHF, Request
from sparse_attention_hub.sparse_attention import (
    AdaptiveSamplingMaskerConfig,
    LocalMaskerConfig,
    QuestTopKMaskerConfig,
    ResearchAttentionConfig,
    SinkMaskerConfig,
)

CONFIG = ResearchAttentionConfig(
    [
        SinkMaskerConfig(sink_size=4),
        LocalMaskerConfig(window_size=64),
        QuestTopKMaskerConfig(heavy_size=0.05, page_size=16, head_granularity="kv_head"),
        AdaptiveSamplingMaskerConfig(
            base_rate_sampling=0.02, epsilon=0.2, delta=0.2, init_offset=0, local_offset=0
        ),
    ],
    dense_layers=(0, 1),
)


def main(arguments: list[str] | None = None) -> None:
    """Prints both answers, and how much the sparse one read."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="left out = a small real model")
    parser.add_argument("--characters", type=int, help="of the document; left out = all of it")
    parser.add_argument("--new-tokens", type=int, default=32)
    options = parser.parse_args(arguments)
    request = Request(LONG_DOCUMENT.text[: options.characters], list(LONG_DOCUMENT.questions[:1]))
    generation = {"max_new_tokens": options.new_tokens}
    with ModelAdapterHF(options.model or str(ensure_small_model()), CONFIG) as adapter:
        dense = adapter.process_request(request, generation)
        with adapter.enable_sparse_mode():
            sparse = adapter.process_request(request, generation)
    print(f"question: {request.questions[0].strip()}")
    for name, response in (("dense", dense), ("sparse", sparse)):
        print(f"{name}, density {response.details[0].density:.3f}: {response.responses[0]!r}")


if __name__ == "__main__":
    main()
