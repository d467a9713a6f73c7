"""A counter-based generator: random numbers as a function of what they are for.

A number depends on (seed, layer, query head, query position, key position) and on nothing that was
drawn before. So a query's sample is the same alone and in a batch, in prefill chunks of any size,
on contiguous tensors and on pages, today and after preemption. (The idea: Salmon et al. 2011,
"Parallel random numbers: as easy as 1, 2, 3"; the mixing function: Steele et al. 2014, SplitMix64.)
"""

from __future__ import annotations

import math

import torch


def _signed(value: int) -> int:
    """A 64-bit pattern as torch's int64 holds it."""
    return value - (1 << 64) if value >= 1 << 63 else value


_STEP = _signed(0x9E3779B97F4A7C15)
_FIRST = _signed(0xBF58476D1CE4E5B9)
_SECOND = _signed(0x94D049BB133111EB)


def _shifted(bits: torch.Tensor, count: int) -> torch.Tensor:
    """Logical shift to the right; torch's own keeps the sign."""
    return (bits >> count) & ((1 << (64 - count)) - 1)


def _mixed(bits: torch.Tensor) -> torch.Tensor:
    bits = bits + _STEP
    # In place from here: there is one number per query head and key, and fresh memory is slow.
    shifted = torch.empty_like(bits)
    for count, factor in ((30, _FIRST), (27, _SECOND), (31, None)):
        torch.bitwise_right_shift(bits, count, out=shifted)
        bits ^= shifted.bitwise_and_((1 << (64 - count)) - 1)
        if factor is not None:
            bits *= factor
    return bits


def uniform_per_key(
    seed: int,
    layer: int,
    num_heads: int,
    positions: torch.Tensor,
    num_keys: int,
    head_step: int = 1,
    first: torch.Tensor | None = None,
) -> torch.Tensor:
    """One number in [0, 1) for each query head, query and key.

    Args:
        seed: Of the configuration.
        layer: Index of the attention layer.
        num_heads: Query heads H.
        positions: `(B, 1 or H, Q, 1)`, int64: each query's position in its sequence.
        num_keys: K; key i is at position i, or at i - `first`.
        head_step: Only query heads 0, `head_step`, 2 * `head_step` and so on, U of them.
        first: `(B, 1 or H, Q, 1)`, int64: where the sequence begins, behind padding in front; see
            `first_visible`. None = at 0.

    Returns:
        float64 `(B, U, Q, K)`, a multiple of 2**-53.
    """
    device = positions.device
    start = torch.tensor(seed, dtype=torch.int64, device=device)
    heads = torch.arange(0, num_heads, head_step, device=device).view(1, -1, 1, 1)
    rows = _mixed(_mixed(_mixed(start) ^ layer) ^ heads)

    def of_drawing_heads(per_head: torch.Tensor) -> torch.Tensor:
        return per_head if per_head.shape[1] == 1 else per_head[:, ::head_step]

    rows = _mixed(rows ^ of_drawing_heads(positions))
    keys = torch.arange(num_keys, device=device)
    bits = _mixed(rows ^ (keys if first is None else keys - of_drawing_heads(first)))
    return _shifted(bits, 11).double().mul_(2.0**-53)


def normal_numbers(seed: int, layer: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Independent standard normal numbers that belong to a layer, not to a position.

    Args:
        seed: Of the configuration.
        layer: Index of the attention layer.
        shape: Of the result.

    Returns:
        float64 on the CPU, so that every device computes with the same ones.
    """
    start = _mixed(_mixed(torch.tensor(seed, dtype=torch.int64)) ^ layer)
    # The complement keeps these apart from the numbers of positions and keys.
    bits = _mixed(~start ^ torch.arange(math.prod(shape)))
    uniform = (_shifted(bits, 11).double() + 0.5) * 2.0**-53  # never 0 or 1
    numbers: torch.Tensor = torch.special.ndtri(uniform)
    return numbers.view(shape)
