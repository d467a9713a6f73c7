"""The softmax denominator of what is selected, and how its terms spread.

What a sampler measures its error against, and what it estimates its error from.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton.language as tl

from vllm_sparse_plugin.paged.triton_kernels.cache_rows import (
    LEAST_PART,
    PARTS,
    DeviceBatch,
    block_sizes,
    key_offsets,
    load_queries,
    score_keys,
    share_of,
)
from vllm_sparse_plugin.paged.triton_kernels.grids import launched
from vllm_sparse_plugin.paged.triton_kernels.lists import DeviceLists


@launched
def _mass_kernel(
    query,
    cache,
    block_table,
    rows,
    tokens,
    log_weights,
    counts,
    top,
    mass,
    squares,
    terms,
    scale,
    query_stride,
    width,
    table_stride,
    list_stride,
    KV_HEADS: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    IN_FLOAT32: tl.constexpr,
    TILE: tl.constexpr,
    WEIGHTS: tl.constexpr,
    HAS_SPREAD: tl.constexpr,
    PARTS: tl.constexpr,
    LEAST: tl.constexpr,
):
    """One part of a list, for all heads of the group."""
    item, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    index, kv_head = item // KV_HEADS, item % KV_HEADS
    count = tl.load(counts + item)
    share = share_of(count, PARTS, LEAST)
    begin, end = part * share, tl.minimum((part + 1) * share, count)
    heads = tl.arange(0, ROWS)
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    # float64: the sums of a long list decide how many keys are sampled.
    total = tl.zeros([ROWS], tl.float64)
    spread = tl.zeros([ROWS], tl.float64)
    number = tl.zeros([ROWS], tl.float64)
    if begin < end:
        blocks = block_table + tl.load(rows + index).to(tl.int64) * table_stride
        queries = load_queries(
            query, index, query_stride, kv_head, HEADS, HEAD_SIZE, ROWS, CHANNELS
        )
        for first in range(begin, end, TILE):
            places = first + tl.arange(0, TILE)
            mask = places < end
            own = tl.load(tokens + item * list_stride + places, mask=mask, other=0)
            offsets = key_offsets(own, mask, blocks, kv_head, width, BLOCK_SIZE, HEAD_SIZE)
            scores = score_keys(queries, cache, offsets, mask, HEAD_SIZE, CHANNELS, IN_FLOAT32)
            scores *= scale
            is_read = mask[None, :] & (heads < HEADS)[:, None]
            if WEIGHTS > 0:
                column = tl.minimum(heads, WEIGHTS - 1)[:, None]
                at = (item * list_stride + places)[None, :] * WEIGHTS + column
                logs = tl.load(log_weights + at, mask=is_read, other=-1e30)
                is_read = is_read & (logs > -1e29)
                scores += logs
            scores = tl.where(is_read, scores, float("-inf"))
            peak = tl.maximum(largest, tl.max(scores, 1))
            shift = tl.where(peak == float("-inf"), 0.0, peak)
            shrink = tl.exp((largest - shift).to(tl.float64))
            powers = tl.exp(scores - shift[:, None]).to(tl.float64)
            added = tl.sum(powers, 1)
            total *= shrink
            if HAS_SPREAD:
                # The squares of two parts, about their common mean (Chan et al. 1979).
                more = tl.sum(is_read.to(tl.float64), 1)
                mean = added / tl.maximum(more, 1.0)
                distance = mean - total / tl.maximum(number, 1.0)
                off_mean = tl.where(is_read, powers - mean[:, None], 0.0)
                both = tl.maximum(number + more, 1.0)
                spread = spread * shrink * shrink + tl.sum(off_mean * off_mean, 1)
                spread += distance * distance * number * more / both
                number += more
            total += added
            largest = peak
    at = (item * HEADS + heads) * PARTS + part
    is_head = heads < HEADS
    tl.store(top + at, largest, mask=is_head)
    tl.store(mass + at, total, mask=is_head)
    if HAS_SPREAD:
        tl.store(squares + at, spread, mask=is_head)
        tl.store(terms + at, number, mask=is_head)


@dataclass(frozen=True)
class DeviceMass:
    """Of each query head's list, by parts.

    Attributes:
        top: `[max_queries * num_heads, parts]`, float32, the largest log term of a part; -inf
            where it has none.
        mass: float64, likewise: the part's sum, divided by `exp(top)`.
        squares: float64, likewise: the sum of the terms' squared distances from their mean,
            divided by `exp(top)**2`; `[0, parts]` where nobody asks for it.
        terms: float64, like `squares`: how many there are.
    """

    top: torch.Tensor
    mass: torch.Tensor
    squares: torch.Tensor
    terms: torch.Tensor

    @classmethod
    def of(
        cls,
        max_queries: int,
        num_heads: int,
        has_spread: bool,
        device: torch.device | str,
        parts: int = PARTS,
    ) -> DeviceMass:
        """Asks for the memory.

        Args:
            max_queries: Queries of a launch, at most.
            num_heads: Query heads.
            has_spread: Whether there is a place for squares.
            device: Of the kernels.
            parts: Of a list, at most, a power of 2.
        """
        rows = max_queries * num_heads
        held = rows if has_spread else 0

        def doubles(count: int) -> torch.Tensor:
            return torch.empty((count, parts), dtype=torch.float64, device=device)

        top = torch.empty((rows, parts), dtype=torch.float32, device=device)
        return cls(top, doubles(rows), doubles(held), doubles(held))


def sum_selected_mass(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    batch: DeviceBatch,
    lists: DeviceLists,
    scaling: float,
    result: DeviceMass,
) -> None:
    """`sum_S exp(s_i) / p_i` over each query head's selection S, by parts of its list.

    Args:
        query: `[num_queries, num_heads, head_size]`, a floating type, its heads side by side.
        kv_cache: See `cache_rows`.
        batch: Of the queries; `lengths` is not looked at.
        lists: Of their KV heads.
        scaling: Of the scores.
        result: Written, of so many queries as there are.

    Raises:
        ValueError: The result or the lists are for fewer queries.
    """
    num_queries, num_heads, _ = query.shape
    sizes = block_sizes(query, kv_cache)
    num_lists = num_queries * kv_cache.shape[1]
    if len(result.top) < num_queries * num_heads or len(lists.counts) < num_lists:
        raise ValueError(
            f"room for the mass of {len(result.top)} heads and {len(lists.counts)} lists does not "
            f"fit queries of {tuple(query.shape)}"
        )
    parts = result.top.shape[1]
    _mass_kernel[(num_lists, parts)](
        query,
        kv_cache,
        batch.block_table,
        batch.rows,
        lists.tokens,
        lists.log_weights,
        lists.counts,
        result.top,
        result.mass,
        result.squares,
        result.terms,
        scaling,
        query.stride(0),
        kv_cache.stride(0),
        batch.block_table.stride(0),
        lists.tokens.shape[1],
        **sizes,
        WEIGHTS=lists.log_weights.shape[2] if lists.log_weights.shape[1] else 0,
        HAS_SPREAD=len(result.squares) > 0,
        PARTS=parts,
        LEAST=LEAST_PART,
    )
