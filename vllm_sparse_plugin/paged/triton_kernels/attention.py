"""Decode attention over lists of tokens: it reads those rows of the cache, and no others.

One pass per list with a running maximum (Milakov and Gimelshein 2018, "Online normalizer
calculation for softmax"); lists are cut into parts, so that one long row keeps all processors busy,
and the parts joined by their maxima (Flash-Decoding, Dao et al. 2023). The query heads of a group
are the rows of one product: each key and value is loaded once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
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
from vllm_sparse_plugin.paged.triton_kernels.grids import await_launches, launched, overlapped

_WARPS, _STAGES = 2, 2
"""Of programs. Many small ones: while some wait for their first keys, others are loading theirs.
(Measured on an H200, batch 8, 32K, 10 % of the keys: 38 us; with four warps and four tiles of half
as many tokens on their way, 50 us.)"""
_TILE_BYTES, _MOST_TOKENS = 16384, 64
"""Of a tile of keys, and its tokens: parts of lists have a multiple of so many."""


@triton.jit
def _count_of(item, counts, whole, KV_HEADS: tl.constexpr):
    """How many tokens a list has, and if its query reads all of its keys instead, how many."""
    count, seen = tl.load(counts + item), tl.load(whole + item // KV_HEADS)
    return tl.where(seen > 0, seen, count), seen


@launched
def _attend_kernel(
    query,
    cache,
    block_table,
    rows,
    tokens,
    log_weights,
    counts,
    whole,
    top,
    mass,
    sums,
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
    PARTS: tl.constexpr,
    LEAST: tl.constexpr,
    IS_OVERLAPPED: tl.constexpr,
):
    """One part of a list: the sum of its values, and the weights' sum and maximum (base 2)."""
    await_launches(IS_OVERLAPPED)
    item, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    count, seen = _count_of(item, counts, whole, KV_HEADS)
    share = share_of(count, PARTS, LEAST)
    begin, end = part * share, tl.minimum((part + 1) * share, count)
    if begin < end:
        listed = tl.where(seen > 0, 0, end)
        index, kv_head = item // KV_HEADS, item % KV_HEADS
        blocks = block_table + tl.load(rows + index).to(tl.int64) * table_stride
        queries = load_queries(
            query, index, query_stride, kv_head, HEADS, HEAD_SIZE, ROWS, CHANNELS
        )
        heads, channels = tl.arange(0, ROWS), tl.arange(0, CHANNELS)
        largest = tl.full([ROWS], float("-inf"), tl.float32)
        weight = tl.zeros([ROWS], tl.float32)
        total = tl.zeros([ROWS, CHANNELS], tl.float32)
        for first in range(begin, end, TILE):
            places = first + tl.arange(0, TILE)
            mask = places < end
            at = tokens + item * list_stride + places
            own = tl.where(seen > 0, places, tl.load(at, mask=places < listed, other=0))
            offsets = key_offsets(own, mask, blocks, kv_head, width, BLOCK_SIZE, HEAD_SIZE)
            scores = score_keys(queries, cache, offsets, mask, HEAD_SIZE, CHANNELS, IN_FLOAT32)
            scores *= scale
            is_read = mask[None, :] & (heads < HEADS)[:, None]
            if WEIGHTS > 0:
                column = tl.minimum(heads, WEIGHTS - 1)[:, None]
                at = (item * list_stride + places)[None, :] * WEIGHTS + column
                is_weighted = is_read & (places < listed)[None, :]
                logs = tl.load(log_weights + at, mask=is_weighted, other=-1e30)
                logs = tl.where(seen > 0, 0.0, logs)
                is_read = is_read & (logs > -1e29)
                scores += logs * 1.4426950408889634  # to base 2
            scores = tl.where(is_read, scores, float("-inf"))
            peak = tl.maximum(largest, tl.max(scores, 1))
            shift = tl.where(peak == float("-inf"), 0.0, peak)  # where a head reads nothing so far
            shrink = tl.exp2(largest - shift)
            powers = tl.exp2(scores - shift[:, None])
            weight = weight * shrink + tl.sum(powers, 1)
            at = offsets[:, None] + HEAD_SIZE + channels[None, :]
            inside = mask[:, None] & (channels < HEAD_SIZE)[None, :]
            values = tl.load(cache + at, mask=inside, other=0.0)
            if values.dtype.is_fp8():
                values = values.to(queries.dtype)
            if IN_FLOAT32:
                added = tl.dot(powers, values.to(tl.float32), input_precision="ieee")
            else:
                added = tl.dot(powers.to(values.dtype), values)
            total = total * shrink[:, None] + added
            largest = peak
        first = (item * PARTS + part) * HEADS
        is_head = heads < HEADS
        tl.store(top + first + heads, largest, mask=is_head)
        tl.store(mass + first + heads, weight, mask=is_head)
        at = (first + heads)[:, None] * HEAD_SIZE + channels[None, :]
        tl.store(sums + at, total, mask=is_head[:, None] & (channels < HEAD_SIZE)[None, :])


@launched
def _join_kernel(
    top,
    mass,
    sums,
    counts,
    whole,
    sink_logits,
    output,
    value_scale,
    KV_HEADS: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    CHANNELS: tl.constexpr,
    PARTS: tl.constexpr,
    LEAST: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    IS_OVERLAPPED: tl.constexpr,
):
    """The parts of one query head."""
    await_launches(IS_OVERLAPPED)
    row = tl.program_id(0).to(tl.int64)
    item, head = row // HEADS, row % HEADS
    count, _ = _count_of(item, counts, whole, KV_HEADS)
    parts, channels = tl.arange(0, PARTS), tl.arange(0, CHANNELS)
    at = (item * PARTS + parts) * HEADS + head
    # Of all parts, while the count is on its way; what is not live may be anything.
    peaks, masses = tl.load(top + at), tl.load(mass + at)
    is_live = parts * share_of(count, PARTS, LEAST) < count
    peaks = tl.where(is_live, peaks, float("-inf"))
    peak = tl.max(peaks, 0)
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    factors = tl.exp2(peaks - peak)
    weight = tl.sum(tl.where(is_live, factors * masses, 0.0), 0)
    if HAS_SINKS:  # (inf where a sink is far above all keys: nothing is left of them)
        sink = tl.load(sink_logits + row % (KV_HEADS * HEADS)).to(tl.float32)
        weight += tl.exp2(sink * 1.4426950408889634 - peak)
    is_channel = channels < HEAD_SIZE
    inside = is_live[:, None] & is_channel[None, :]
    own = tl.load(sums + at[:, None] * HEAD_SIZE + channels[None, :], mask=inside, other=0.0)
    result = tl.sum(factors[:, None] * own, 0) / tl.where(weight > 0, weight, 1.0) * value_scale
    target = output + row * HEAD_SIZE + channels
    tl.store(target, result.to(output.dtype.element_ty), mask=is_channel)


@dataclass(frozen=True)
class AttentionWorkspace:
    """Where the parts of lists leave their results.

    Attributes:
        top: `[max_queries * num_kv_heads, parts, heads of a group]`, float32.
        mass: Likewise.
        sums: `[..., head_size]`, float32.
    """

    top: torch.Tensor
    mass: torch.Tensor
    sums: torch.Tensor

    @classmethod
    def of(
        cls,
        max_queries: int,
        num_heads: int,
        num_kv_heads: int,
        head_size: int,
        device: torch.device | str,
        parts: int = PARTS,
    ) -> AttentionWorkspace:
        """Asks for the memory.

        Args:
            max_queries: Queries of a launch, at most.
            num_heads: Query heads.
            num_kv_heads: KV heads.
            head_size: Channels of a value.
            device: Of the kernels.
            parts: Of a list, at most, a power of 2. A result's last bits depend on it.
        """
        shape = (max_queries * num_kv_heads, parts, num_heads // num_kv_heads)
        top = torch.empty(shape, dtype=torch.float32, device=device)
        sums = torch.empty((*shape, head_size), dtype=torch.float32, device=device)
        return cls(top, torch.empty_like(top), sums)


def attend_lists(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    batch: DeviceBatch,
    tokens: torch.Tensor,
    log_weights: torch.Tensor | None,
    counts: torch.Tensor,
    scaling: float,
    output: torch.Tensor,
    workspace: AttentionWorkspace,
    whole: torch.Tensor,
    sink_logits: torch.Tensor | None = None,
    value_scale: float = 1.0,
) -> None:
    """`sum_S (exp(s_i) / p_i) v_i / sum_S (exp(s_i) / p_i)` for every query head's selection S.

    Where the cache is of a half-precision type, so are the factors of both products, on tensor
    cores; sums are float32. Where it has 8 bits, the factors are of the queries' type.

    Args:
        query: `[num_queries, num_heads, head_size]`, a floating type, its heads side by side.
        kv_cache: See `cache_rows`.
        batch: Of the queries.
        tokens: `[>= num_queries * num_kv_heads, capacity]`, int32 positions.
        log_weights: `[>= num_queries * num_kv_heads, capacity, heads of a group]`, float32, see
            `lists`, or `[..., 1]` for all heads of the group; with capacity 0, or None, every query
            head of a group reads all tokens of its KV head's list, with weight 1.
        counts: `[>= num_queries * num_kv_heads]`, int32, tokens of each list.
        scaling: Of the scores.
        output: `[num_queries, num_heads, head_size]`, a floating type, contiguous; written, zeros
            for an empty selection.
        workspace: For as many queries.
        whole: `[num_queries]`, int32: how many keys a query reads that reads all of its keys,
            whatever its lists are; 0 for others.
        sink_logits: `[num_heads]`, a floating type, of learned attention sinks: each adds its
            exponential to the denominator. None = the layer has none.
        value_scale: Of the result: what values are multiplied with, see `CacheScales`.

    Raises:
        ValueError: Something does not fit the queries.
    """
    num_queries, num_heads, head_size = query.shape
    sizes = block_sizes(query, kv_cache)
    heads, num_lists = sizes["HEADS"], num_queries * kv_cache.shape[1]
    tile, warps = sizes["TILE"], 4
    if not sizes["IN_FLOAT32"]:  # what is multiplied without tensor cores takes more registers
        row_bytes = sizes["CHANNELS"] * kv_cache.itemsize
        tile, warps = max(16, min(_MOST_TOKENS, _TILE_BYTES // row_bytes)), _WARPS
    if output.shape != query.shape or not output.is_contiguous():
        raise ValueError(f"the output must be contiguous {tuple(query.shape)}")
    if min(len(counts), len(tokens)) < num_lists:
        raise ValueError(f"{len(counts)}, {len(tokens)} lists for queries of {num_lists}")
    if sink_logits is not None and (
        sink_logits.shape != (num_heads,) or not sink_logits.is_contiguous()
    ):
        raise ValueError(
            f"logits of sinks must be contiguous [{num_heads}], got {tuple(sink_logits.shape)}"
        )
    parts = workspace.sums.shape[1]
    if len(workspace.sums) < num_lists or workspace.sums.shape[2:] != (heads, head_size):
        raise ValueError(
            f"a workspace of {tuple(workspace.sums.shape)} does not fit queries of "
            f"{tuple(query.shape)}"
        )
    width = 0
    if log_weights is not None and log_weights.shape[1] > 0:
        width = log_weights.shape[2]
        if width not in (1, heads) or log_weights.shape[:2] != tokens.shape:
            raise ValueError(
                f"log weights of {tuple(log_weights.shape)} do not fit {heads} heads and lists of "
                f"{tuple(tokens.shape)}"
            )
    _attend_kernel[(num_lists, parts)](
        query,
        kv_cache,
        batch.block_table,
        batch.rows,
        tokens,
        log_weights if width else counts,
        counts,
        whole,
        workspace.top,
        workspace.mass,
        workspace.sums,
        scaling * math.log2(math.e),
        query.stride(0),
        kv_cache.stride(0),
        batch.block_table.stride(0),
        tokens.shape[1],
        **sizes | {"TILE": tile},
        WEIGHTS=width,
        PARTS=parts,
        LEAST=LEAST_PART,
        num_warps=warps,
        num_stages=_STAGES,
        **overlapped(kv_cache.device),
    )
    _join_kernel[(num_queries * num_heads,)](
        workspace.top,
        workspace.mass,
        workspace.sums,
        counts,
        whole,
        counts if sink_logits is None else sink_logits,
        output,
        float(value_scale),
        KV_HEADS=sizes["KV_HEADS"],
        HEADS=heads,
        HEAD_SIZE=head_size,
        CHANNELS=sizes["CHANNELS"],
        PARTS=parts,
        LEAST=LEAST_PART,
        HAS_SINKS=sink_logits is not None,
        **overlapped(kv_cache.device),
    )
