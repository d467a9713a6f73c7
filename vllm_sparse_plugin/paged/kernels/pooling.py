"""Scores of query heads as scores of the KV heads that select for them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import prange

from vllm_sparse_plugin.paged.kernels.compiled import compiled
from vllm_sparse_plugin.paged.kernels.exponential import exp_in_place

_TILE = 4096
"""Scores that one task works on. Fixed: sums in other parts would differ in their last bits."""
_SCORES_AT_ONCE = 1 << 19
"""Scores that all tasks work on together: about what the cores' caches hold."""


@compiled()
def _largest(values: np.ndarray) -> Any:
    # As integers that rank as the floats do: compilers make no vector instructions of a running
    # maximum of floats.
    bits = values.view(np.int32)
    found = np.empty(1, np.int32)
    most = np.int32(-(1 << 31))
    for i in range(bits.shape[0]):
        rank = np.int32(bits[i] ^ ((bits[i] >> np.int32(31)) & np.int32(0x7FFFFFFF)))
        most = rank if rank > most else most
    found[0] = most ^ ((most >> np.int32(31)) & np.int32(0x7FFFFFFF))
    return found.view(np.float32)[0]


@compiled(fastmath=True)
def _sum(values: np.ndarray) -> Any:
    total = np.float32(0.0)
    for i in range(values.shape[0]):
        total += values[i]
    return total


@compiled(parallel=True)
def pool_scores(
    scores: np.ndarray, selectors: int, page_size: int, scaling: float, lengths: np.ndarray
) -> None:
    """The mean, over a group's query heads, of the share of attention that scores give each page.

    The rule of `head_groups.pooled_scores`.

    Args:
        scores: `[num_queries, num_heads, >= pages]`, float32; overwritten: a group's shares are in
            the row of its first head.
        selectors: Groups per query, fewer than heads.
        page_size: Keys of a page.
        scaling: Of the scores.
        lengths: `[num_queries]`.
    """
    num_queries, num_heads, _ = scores.shape
    all_items = num_queries * selectors
    heads = num_heads // selectors
    scale = np.float32(scaling)
    longest = (int(lengths.max()) + page_size - 1) // page_size
    tiles = (longest + _TILE - 1) // _TILE
    held = max(1, min(all_items, _SCORES_AT_ONCE // (heads * longest)))
    peaks = np.empty((held, heads, tiles), np.float32)
    masses = np.empty((held, heads, tiles), np.float32)
    for start in range(0, all_items, held):
        items = min(held, all_items - start)
        for task in prange(items * heads * tiles):
            item, head, tile = task // tiles // heads, task // tiles % heads, task % tiles
            index, selector = (start + item) // selectors, (start + item) % selectors
            begin, end = _tile_of(lengths[index], page_size, tile)
            peaks[item, head, tile] = _largest(scores[index, selector * heads + head, begin:end])
        for task in prange(items * heads * tiles):
            item, head, tile = task // tiles // heads, task // tiles % heads, task % tiles
            index, selector = (start + item) // selectors, (start + item) % selectors
            begin, end = _tile_of(lengths[index], page_size, tile)
            row = scores[index, selector * heads + head, begin:end]
            peak = _largest(peaks[item, head]) * scale
            masses[item, head, tile] = exp_in_place(row, end - begin, scale, peak)
        for task in prange(items * tiles):
            item, tile = task // tiles, task % tiles
            index, first = (start + item) // selectors, (start + item) % selectors * heads
            begin, end = _tile_of(lengths[index], page_size, tile)
            shares = scores[index, first, begin:end]
            for head in range(heads):
                row = scores[index, first + head, begin:end]
                factor = np.float32(1.0) / (_sum(masses[item, head]) * np.float32(heads))
                if head == 0:
                    for i in range(end - begin):
                        shares[i] *= factor
                else:
                    for i in range(end - begin):
                        shares[i] += row[i] * factor


@compiled()
def _tile_of(length: int, page_size: int, tile: int) -> tuple[int, int]:
    pages = (length + page_size - 1) // page_size
    return min(tile * _TILE, pages), min((tile + 1) * _TILE, pages)
