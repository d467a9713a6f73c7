"""Whether launches that overlap give what launches give that do not, bit for bit, each time."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from benchmarks.gpu.timing import Launch, captured, in_turn
from vllm_sparse_plugin.paged.triton_kernels.grids import launches_apart

REPLAYS = 200


def differing_replays(
    launches: Sequence[Launch], output: torch.Tensor, replays: int = REPLAYS
) -> int:
    """How often the last output was another than that of launches one after the other.

    A launch that begins before what it reads is there would be seen here, if it happens at all: a
    graph of all launches is replayed, between them nothing that would hold the next one up.

    Args:
        launches: Of a step, compiled already, as they are overlapped.
        output: What the last of them writes.
        replays: Of all of them.
    """
    run = in_turn(launches)
    with launches_apart():
        run()
    expected = output.clone()
    differing = torch.zeros((), dtype=torch.int64, device=output.device)
    replay = captured(launches).replay if output.device.type == "cuda" else run
    for _ in range(replays):
        output.fill_(torch.nan)
        replay()
        differing += (output != expected).any()
    return int(differing)
