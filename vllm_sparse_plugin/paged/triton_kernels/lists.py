"""From flags to one list of tokens per KV head: each token is loaded once.

A token's weights say which query heads of the KV head's group read it, see `kernels.group_lists`.
Where units are KV heads, one weight is for all of the group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from vllm_sparse_plugin.paged.triton_kernels.grids import launched, power_of_2, programs_per_row

_TILE = 1024
NOT_SELECTED = -1e30
"""In place of -log of a probability, which is at least 0."""


@triton.jit
def _is_listed(flag, FLAG: tl.constexpr):
    return (flag != 0) if FLAG == 0 else (flag == FLAG)


@launched
def _count_kernel(
    flags,
    lengths,
    tile_counts,
    tile_selected,
    stride,
    tiles,
    LISTS: tl.constexpr,
    UNITS: tl.constexpr,
    FLAG: tl.constexpr,
    TILE: tl.constexpr,
):
    """How many tokens each tile of a list's keys has, and each unit of it selects."""
    item = tl.program_id(0).to(tl.int64)
    length = tl.load(lengths + item // LISTS)
    for tile in range(tl.program_id(1), tl.cdiv(length, TILE), tl.num_programs(1)):
        keys = tile * TILE + tl.arange(0, TILE)
        union = tl.zeros([TILE], tl.int32)
        for head in range(UNITS):
            unit = item * UNITS + head
            flag = tl.load(flags + unit * stride + keys, mask=keys < length, other=0)
            own = _is_listed(flag, FLAG).to(tl.int32)
            tl.store(tile_selected + unit * tiles + tile, tl.sum(own, 0))
            union |= own
        tl.store(tile_counts + item * tiles + tile, tl.sum(union, 0))


@launched
def _list_kernel(
    flags,
    lengths,
    probability,
    key_probability,
    tile_counts,
    tile_selected,
    tokens,
    log_weights,
    counts,
    selected,
    stride,
    list_stride,
    tiles,
    LISTS: tl.constexpr,
    UNITS: tl.constexpr,
    FLAG: tl.constexpr,
    IS_WEIGHTED: tl.constexpr,
    HAS_PROBABILITY: tl.constexpr,
    HAS_KEY_PROBABILITY: tl.constexpr,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
):
    """Writes a list, each tile's tokens behind those of the tiles before it."""
    item = tl.program_id(0).to(tl.int64)
    length = tl.load(lengths + item // LISTS)
    live = tl.cdiv(length, TILE)
    every = tl.arange(0, TILES)
    of_tiles = tl.load(tile_counts + item * tiles + every, mask=every < live, other=0)
    if tl.program_id(1) == 0:
        tl.store(counts + item, tl.sum(of_tiles, 0))
        for head in range(UNITS):
            row = tile_selected + (item * UNITS + head) * tiles
            own = tl.load(row + every, mask=every < live, other=0)
            tl.store(selected + item * UNITS + head, tl.sum(own, 0))
    for tile in range(tl.program_id(1), live, tl.num_programs(1)):
        keys = tile * TILE + tl.arange(0, TILE)
        mask = keys < length
        union = tl.zeros([TILE], tl.int32)
        for head in range(UNITS):
            flag = tl.load(flags + (item * UNITS + head) * stride + keys, mask=mask, other=0)
            union |= _is_listed(flag, FLAG).to(tl.int32)
        before = tl.sum(tl.where(every < tile, of_tiles, 0), 0)
        place = item * list_stride + before + tl.cumsum(union, 0) - 1
        tl.store(tokens + place, keys, mask=union > 0)
        if IS_WEIGHTED:
            for head in range(UNITS):
                unit = item * UNITS + head
                flag = tl.load(flags + unit * stride + keys, mask=mask, other=0)
                weight = tl.zeros([TILE], tl.float32)
                if HAS_PROBABILITY:
                    share = tl.load(probability + unit).to(tl.float64)
                    log_share = tl.log(tl.where(share > 0, share, 1.0)).to(tl.float32)
                    weight = tl.where(flag == 2, -log_share, 0.0)
                if HAS_KEY_PROBABILITY:
                    is_own = mask & (flag == 3)
                    own = tl.load(key_probability + unit * stride + keys, mask=is_own, other=1.0)
                    weight = tl.where(is_own, -tl.log(own), weight)
                weight = tl.where(_is_listed(flag, FLAG), weight, -1e30)
                tl.store(log_weights + place * UNITS + head, weight, mask=union > 0)


@dataclass(frozen=True)
class DeviceLists:
    """Memory for lists of tokens; see `TokenLists`.

    Attributes:
        tokens: `[max_queries * num_kv_heads, capacity]`, int32 positions, ascending.
        log_weights: `[max_queries * num_kv_heads, capacity, width]`, float32; width is the units of
            a KV head. Capacity 0: every query head reads all tokens, with weight 1.
        counts: `[max_queries * num_kv_heads]`, int32, tokens of each list. What lies behind them is
            never read.
        selected: `[max_queries * num_kv_heads * width]`, int32, keys that each unit selects.
        tile_counts: `[max_queries * num_kv_heads, tiles]`, int32: scratch.
        tile_selected: `[max_queries * num_kv_heads * width, tiles]`, int32: scratch.
    """

    tokens: torch.Tensor
    log_weights: torch.Tensor
    counts: torch.Tensor
    selected: torch.Tensor
    tile_counts: torch.Tensor
    tile_selected: torch.Tensor

    @classmethod
    def of(
        cls,
        max_queries: int,
        num_kv_heads: int,
        units: int,
        capacity: int,
        is_weighted: bool,
        device: torch.device | str,
    ) -> DeviceLists:
        """Asks for the memory.

        Args:
            max_queries: Queries of a launch, at most.
            num_kv_heads: KV heads.
            units: Of each KV head.
            capacity: Of the flags.
            is_weighted: Whether keys may have been sampled. More units than one have weights in any
                case.
            device: Of the kernels.
        """
        lists, tiles = max_queries * num_kv_heads, -(-capacity // _TILE)
        held = capacity if is_weighted or units > 1 else 0

        def integers(*size: int) -> torch.Tensor:
            return torch.empty(size, dtype=torch.int32, device=device)

        return cls(
            integers(lists, capacity),
            torch.empty((lists, held, units), dtype=torch.float32, device=device),
            integers(lists),
            integers(lists * units),
            integers(lists, tiles),
            integers(lists * units, tiles),
        )


def list_tokens(
    flags: torch.Tensor,
    lengths: torch.Tensor,
    lists: DeviceLists,
    probability: torch.Tensor | None = None,
    key_probability: torch.Tensor | None = None,
    only: int = 0,
) -> None:
    """The positions that at least one unit of a KV head selects, ascending, and their weights.

    Args:
        flags: `[num_queries * num_units, capacity]`, uint8; units are query heads or KV heads.
        lengths: `[num_queries]`, int32.
        lists: Written, of so many queries as there are.
        probability: `[num_queries * num_units]`, float32, of keys with flag 2, if there are any.
        key_probability: `[num_queries * num_units, capacity]`, float32, of keys with flag 3, if
            there are any.
        only: List only keys with this flag; 0: all that are selected.

    Raises:
        ValueError: The lists are too short for the flags, too few or of other units, or have no
            place for the weights that are asked for.
    """
    rows, capacity = flags.shape
    units = lists.log_weights.shape[2]
    num_lists = rows // units
    is_weighted = lists.log_weights.shape[1] > 0
    if lists.tokens.shape[1] < capacity or len(lists.tokens) < num_lists or rows % units:
        raise ValueError(
            f"lists of {tuple(lists.tokens.shape)} tokens, for {units} units each, cannot hold "
            f"flags of {tuple(flags.shape)}"
        )
    if not is_weighted and (units > 1 or probability is not None or key_probability is not None):
        raise ValueError("sampled keys need lists with weights")
    tiles = lists.tile_counts.shape[1]
    grid = (num_lists, programs_per_row(num_lists, capacity, _TILE))
    per_query = num_lists // len(lengths)
    _count_kernel[grid](
        flags,
        lengths,
        lists.tile_counts,
        lists.tile_selected,
        capacity,
        tiles,
        LISTS=per_query,
        UNITS=units,
        FLAG=only,
        TILE=_TILE,
    )
    _list_kernel[grid](
        flags,
        lengths,
        lists.counts if probability is None else probability,
        lists.counts if key_probability is None else key_probability,
        lists.tile_counts,
        lists.tile_selected,
        lists.tokens,
        lists.log_weights,
        lists.counts,
        lists.selected,
        capacity,
        lists.tokens.shape[1],
        tiles,
        LISTS=per_query,
        UNITS=units,
        FLAG=only,
        IS_WEIGHTED=is_weighted,
        HAS_PROBABILITY=probability is not None,
        HAS_KEY_PROBABILITY=key_probability is not None,
        TILES=power_of_2(tiles),
        TILE=_TILE,
    )
