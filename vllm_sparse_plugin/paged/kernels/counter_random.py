"""The random numbers of `sampling.counter_random`, one at a time.

A number is a function of (seed, layer, query head, query position, key position); here it is the 53
bits that `uniform_per_key` divides by 2**53.
"""

from __future__ import annotations

import numpy as np

from vllm_sparse_plugin.paged.kernels.compiled import compiled

_STEP = np.uint64(0x9E3779B97F4A7C15)
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)
NUMBERS = np.uint64(1 << 53)
"""How many there are: numbers are below."""


@compiled(inline=True)
def _mixed(bits: np.uint64) -> np.uint64:
    bits = bits + _STEP
    bits = (bits ^ (bits >> np.uint64(30))) * _FIRST
    bits = (bits ^ (bits >> np.uint64(27))) * _SECOND
    return bits ^ (bits >> np.uint64(31))


@compiled()
def stream_of(seed: int, layer: int, head: int, position: int) -> np.uint64:
    """What the numbers of one query have in common.

    Args:
        seed: Of the configuration.
        layer: Index of the attention layer.
        head: Query head.
        position: Of the query in its sequence.
    """
    bits = _mixed(_mixed(np.uint64(seed)) ^ np.uint64(layer))
    stream: np.uint64 = _mixed(_mixed(bits ^ np.uint64(head)) ^ np.uint64(position))
    return stream


@compiled(inline=True)
def number_of(stream: np.uint64, key: np.uint64) -> np.uint64:
    """The number of the key at a position, in [0, `NUMBERS`)."""
    number: np.uint64 = _mixed(stream ^ key) >> np.uint64(11)
    return number
