"""The same rows of keys, written by both sets of kernels, and what scores may differ by."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from tests.plugin.paged.paged_rows import Rows
from tests.plugin.triton.interpreter import DEVICE
from tests.plugin.triton.row_order import from_device
from vllm_sparse_plugin.paged.triton_kernels.writing import write_rows

UNWRITTEN = -7.0
"""What scores are filled with: nothing beyond a length may be touched."""
_HALF_ULP = 2.0**-24
"""Largest relative error of one rounding to float32."""


@dataclass
class Batch:
    """A batch's tensors on the device."""

    block_table: torch.Tensor
    rows: torch.Tensor
    lengths: torch.Tensor
    query: torch.Tensor

    @classmethod
    def of(cls, rows: Rows) -> "Batch":
        batch = rows.batch
        arrays = (batch.block_table, batch.rows, batch.lengths)
        return cls(*(torch.from_numpy(array).to(DEVICE) for array in arrays), on_device(rows.query))


def on_device(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float().to(DEVICE)


def slots_of(rows: Rows, row: int) -> torch.Tensor:
    """Where a row's keys are."""
    size = rows.cache.layout.shape.block_size
    place = torch.arange(rows.keys[row].shape[2])
    return torch.from_numpy(rows.batch.block_table[row])[place // size].long() * size + place % size


def written_again(
    rows: Rows, update: Callable[[torch.Tensor, torch.Tensor], None], seed: int = 5
) -> torch.Tensor:
    """A cache of the same rows, written by the Triton kernels; see `written_in_steps`.

    Args:
        rows: With what is to be written.
        update: Of the index, after each step: takes the cache and the step's slots.
        seed: Of the chunks' sizes.
    """

    def write(kv_cache: torch.Tensor, key: torch.Tensor, value: torch.Tensor, step: torch.Tensor):
        write_rows(key, value, kv_cache, step)
        update(kv_cache, step)

    return written_in_steps(rows, write, seed)


def written_in_steps(rows: Rows, write: Callable[..., None], seed: int = 5) -> torch.Tensor:
    """A cache of the same rows.

    In steps as an engine's: each has some tokens of every sequence that has any left, and padding.

    Args:
        rows: With what is to be written.
        write: Takes the cache, and a step's keys, values and slots.
        seed: Of the chunks' sizes.
    """
    random = np.random.default_rng(seed)
    kv_cache = torch.full_like(rows.kv_cache, torch.nan).to(DEVICE)
    slots = [slots_of(rows, row) for row in range(len(rows.keys))]
    starts = [0] * len(slots)
    while any(start < len(own) for start, own in zip(starts, slots, strict=True)):
        chunks = []
        for row, own in enumerate(slots):
            end = min(len(own), starts[row] + int(random.integers(1, 70)))
            chunks.append(slice(starts[row], end))
            starts[row] = end
        step = torch.cat([*(s[c] for s, c in zip(slots, chunks, strict=True)), torch.tensor([-1])])
        step = step.to(DEVICE)
        key, value = (
            torch.cat([t[0, :, c] for t, c in zip(tensors, chunks, strict=True)], dim=1)
            for tensors in (rows.keys, rows.values)
        )
        # Heads outermost in memory, and one token less than slots: as a model may hand them over.
        write(kv_cache, key.to(DEVICE).transpose(0, 1), value.to(DEVICE).transpose(0, 1), step)
    return kv_cache


def assert_same_bytes(rows: Rows, kv_cache: torch.Tensor) -> None:
    """All of it, what was never written too."""
    found = from_device(kv_cache, rows.cache.layout.shape)
    assert torch.equal(found.view(torch.uint8), rows.kv_cache.view(torch.uint8))


def empty_scores(rows: Rows, page_size: int = 1) -> torch.Tensor:
    """Of the longest row, with some columns to spare."""
    columns = -(-int(rows.batch.lengths.max()) // page_size) + 3
    return torch.full((*rows.query.shape[:2], columns), UNWRITTEN, device=DEVICE)


def assert_close_sums(
    found: torch.Tensor, expected: torch.Tensor, sizes: torch.Tensor, terms: int
) -> None:
    """Sums of the same products, in different orders.

    Each product and each partial sum is rounded once, so either result is off by at most `terms`
    roundings of the sum of the terms' sizes.

    Args:
        found: float32.
        expected: float32 or float64.
        sizes: Sums of the absolute terms.
        terms: How many are added.
    """
    error = (found.cpu().double() - expected.double()).abs()
    assert (error <= 2 * (terms + 1) * _HALF_ULP * sizes.double()).all(), error.max()


def largest_products(rows: Rows) -> torch.Tensor:
    """`[num_queries, num_heads, 1]`: what the terms' sizes of any score sum up to, at most."""
    queries = rows.query.double().abs().sum(-1, keepdim=True)
    keys = torch.stack([key.abs().max() if key.numel() else key.sum() for key in rows.keys])
    return queries * keys.double()[:, None, None]


def edge_lengths(block_size: int) -> tuple[int, ...]:
    """Padding, both sides of a block's edge, and several blocks; few, the interpreter is slow."""
    if block_size > 32:
        return (1, 0, block_size + 1)
    return (0, 1, block_size, block_size + 1, 2 * block_size - 1)
