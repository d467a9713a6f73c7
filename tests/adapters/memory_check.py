"""Whether a model's memory returns, on any device: `python -m tests.adapters.memory_check MODEL`.

The command needs a GPU; the tests run the same function on the CPU.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch

from sparse_attention_hub import ModelAdapterHF, Request
from sparse_attention_hub.adapters import ModelServerHF
from sparse_attention_hub.sparse_attention import (
    LocalMaskerConfig,
    ResearchAttentionConfig,
    SinkMaskerConfig,
)

CONFIG = ResearchAttentionConfig([SinkMaskerConfig(2), LocalMaskerConfig(8)])
REQUEST = Request("The river Foo is 312 km long. " * 10, ["How long is it?", "Where is it?"])


def memory_of_an_adapter(
    model_name: str, device: str, allocated: Callable[[], int]
) -> tuple[int, int, int]:
    """Uses an adapter and lets it go.

    Args:
        model_name: Or folder.
        device: Where it runs.
        allocated: Bytes that tensors hold there now.

    Returns:
        Bytes more than before: with the model loaded, after requests to it, and at the end.
    """
    server = ModelServerHF()
    before = allocated()
    with ModelAdapterHF(model_name, CONFIG, device=device) as adapter:
        loaded = allocated() - before
        adapter.process_request(REQUEST, {"max_new_tokens": 4})
        with adapter.enable_sparse_mode():
            adapter.process_request(REQUEST, {"max_new_tokens": 4})
        used = allocated() - before
    server.cleanup_unused()
    return loaded, used, allocated() - before


def main() -> None:
    """Prints the three numbers, in bytes; fails if memory did not return."""
    device = "cuda"
    loaded, used, left = memory_of_an_adapter(sys.argv[1], device, torch.cuda.memory_allocated)
    sys.stdout.write(f"loaded {loaded}, after requests {used}, left {left}\n")
    # cuBLAS keeps a workspace of some MiB for itself once it has run.
    if left > 64 * 2**20 or used > loaded + 64 * 2**20:
        sys.exit("memory did not return")


if __name__ == "__main__":
    main()
