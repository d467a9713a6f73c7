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

_GROUPS = 128
"""Of 16 keys each, in a tile: one for each thread of a program."""
_TILE = 16 * _GROUPS
_HEADS = 2
"""At once: of more, registers would run out (of four, with Triton 3.6)."""
NOT_SELECTED = -1e30
"""In place of -log of a probability, which is at least 0."""


@triton.jit
def _keys_of(tile, GROUPS: tl.constexpr):
    """Keys of a tile, `[1, 16, GROUPS]`, int32, each column 16 neighbours: those of one thread.

    It loads 16 flags at once, adds up its own and stores its own tokens: nothing but sums is
    passed from thread to thread.
    """
    inside, groups = tl.arange(0, 16), tl.arange(0, GROUPS)
    return ((tile * GROUPS + groups[None, :]) * 16 + inside[:, None])[None, :, :]


@triton.jit
def _flags_of(flags, head, keys, length, stride, UNITS: tl.constexpr):
    """Flags of keys, `[HEADS, 16, GROUPS]`, uint8; behind the length, anything.

    There, too, they are loaded, as far as a row has them: a mask that differs between neighbours
    would make each flag a load of its own.
    """
    held = tl.minimum(tl.cdiv(length, 16) * 16, stride)
    at = flags + head.to(tl.int64) * stride + keys
    return tl.load(at, mask=(head < UNITS) & (keys < held), other=0)


@triton.jit
def _is_listed(flag, FLAG: tl.constexpr):
    return (flag != 0) if FLAG == 0 else (flag == FLAG)


@triton.jit
def _any_listed(flag, FLAG: tl.constexpr):
    """Whether any of the heads lists a key, `[16, GROUPS]`, uint8: 0 if not."""
    own = flag if FLAG == 0 else (flag == FLAG).to(tl.uint8)
    return tl.max(own, 0)


@launched
def _count_kernel(
    flags,
    lengths,
    probability,
    unit_weights,
    tile_counts,
    tile_selected,
    stride,
    tiles,
    LISTS: tl.constexpr,
    UNITS: tl.constexpr,
    HEADS: tl.constexpr,
    FLAG: tl.constexpr,
    IS_COUNTED: tl.constexpr,
    HAS_PROBABILITY: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """How many tokens each tile of a list's keys has, and if asked, each of its units selects.

    The last program of a list has no tiles: it computes what a key weighs that a unit has sampled,
    which all those that write the list would have to do otherwise.
    """
    item = tl.program_id(0).to(tl.int64)
    length = tl.load(lengths + item // LISTS)
    flags += item * UNITS * stride
    programs = tl.num_programs(1) - 1
    live = tl.where(tl.program_id(1) < programs, tl.cdiv(length, 16 * GROUPS), 0)
    for tile in range(tl.program_id(1), live, programs):
        keys = _keys_of(tile, GROUPS)
        found = tl.zeros([16, GROUPS], tl.uint8)
        for first in tl.static_range(0, UNITS, HEADS):
            head = first + tl.arange(0, HEADS)
            flag = _flags_of(flags, head[:, None, None], keys, length, stride, UNITS)
            found |= _any_listed(flag, FLAG)
            if IS_COUNTED:
                at = tile_selected + (item * UNITS + head) * tiles + tile
                own = (_is_listed(flag, FLAG) & (keys < length)).to(tl.int32)
                tl.store(at, tl.sum(tl.sum(own, 1), 1), mask=head < UNITS)
        union = ((found != 0)[None, :, :] & (keys < length)).to(tl.int32)
        tl.store(tile_counts + item * tiles + tile, tl.sum(tl.sum(tl.sum(union, 0), 0), 0))
    if HAS_PROBABILITY:  # noqa: SIM102 (this one is decided while compiling)
        if tl.program_id(1) == programs:
            for first in tl.static_range(0, UNITS, HEADS):
                head = first + tl.arange(0, HEADS)
                unit, is_unit = item * UNITS + head, head < UNITS
                share = tl.load(probability + unit, mask=is_unit, other=1.0).to(tl.float64)
                log_share = tl.log(tl.where(share > 0, share, 1.0)).to(tl.float32)
                tl.store(unit_weights + unit, -log_share, mask=is_unit)


@launched
def _list_kernel(
    flags,
    lengths,
    key_probability,
    unit_weights,
    tile_counts,
    tile_selected,
    tokens,
    log_weights,
    counts,
    reads,
    stride,
    list_stride,
    reads_stride,
    tiles,
    LISTS: tl.constexpr,
    UNITS: tl.constexpr,
    HEADS: tl.constexpr,
    FLAG: tl.constexpr,
    READERS: tl.constexpr,
    IS_WEIGHTED: tl.constexpr,
    HAS_PROBABILITY: tl.constexpr,
    HAS_KEY_PROBABILITY: tl.constexpr,
    TILES: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Writes a list, each tile's tokens behind those of the tiles before it.

    The last program of a list has no tiles: it adds up how many tokens there are.
    """
    item = tl.program_id(0).to(tl.int64)
    length = tl.load(lengths + item // LISTS)
    flags += item * UNITS * stride
    tokens += item * list_stride
    log_weights += item * list_stride * UNITS
    live = tl.cdiv(length, 16 * GROUPS)
    every = tl.arange(0, TILES)
    of_tiles = tl.load(tile_counts + item * tiles + every, mask=every < live, other=0)
    programs = tl.num_programs(1) - 1
    is_last = tl.program_id(1) == programs
    for tile in range(tl.program_id(1), tl.where(is_last, 0, live), programs):
        keys = _keys_of(tile, GROUPS)
        found = tl.zeros([16, GROUPS], tl.uint8)
        for first in tl.static_range(0, UNITS, HEADS):
            head = (first + tl.arange(0, HEADS))[:, None, None]
            flag = _flags_of(flags, head, keys, length, stride, UNITS)
            found |= _any_listed(flag, FLAG)
        is_token = (found != 0)[None, :, :] & (keys < length)
        union = is_token.to(tl.int32)
        before = tl.sum(tl.where(every < tile, of_tiles, 0), 0)
        of_groups = tl.sum(union, 1)
        before += tl.cumsum(of_groups, 1) - of_groups
        place = before[:, None, :] + tl.cumsum(union, 1) - 1
        tl.store(tokens + place, keys, mask=is_token)
        if IS_WEIGHTED:
            for first in tl.static_range(0, UNITS, HEADS):
                head = (first + tl.arange(0, HEADS))[:, None, None]
                unit, is_unit = item * UNITS + head, head < UNITS
                if UNITS > HEADS:
                    flag = _flags_of(flags, head, keys, length, stride, UNITS)
                weight = tl.zeros(flag.shape, tl.float32)
                if HAS_PROBABILITY:
                    own = tl.load(unit_weights + unit, mask=is_unit, other=0.0)
                    weight = tl.where(flag == 2, own, 0.0)
                if HAS_KEY_PROBABILITY:
                    is_own = is_token & (flag == 3)
                    at = key_probability + unit * stride + keys
                    weight = tl.where(is_own, -tl.log(tl.load(at, mask=is_own, other=1.0)), weight)
                weight = tl.where(_is_listed(flag, FLAG), weight, -1e30)
                if UNITS % HEADS != 0:
                    # There is no wide store to gain from neighbouring heads: Triton need not know
                    # that they are, and pass keys from thread to thread for it.
                    head = tl.where(is_unit, head, 0)
                at = log_weights + place * UNITS + head
                tl.store(at, weight, mask=is_unit & is_token)
    if is_last:
        count = tl.sum(of_tiles, 0)
        tl.store(counts + item, count)
        if READERS > 0:  # noqa: SIM102 (this one is decided while compiling)
            if length > 0:
                keys_read = count
                if UNITS > 1:
                    keys_read = tl.zeros_like(count)
                    for first in tl.static_range(0, UNITS, HEADS):
                        head = first + tl.arange(0, HEADS)
                        at = tile_selected + (item * UNITS + head)[:, None] * tiles + every[None, :]
                        mask = (head < UNITS)[:, None] & (every < live)[None, :]
                        keys_read += tl.sum(tl.sum(tl.load(at, mask=mask, other=0), 1), 0)
                total = reads + item // LISTS * reads_stride
                tl.atomic_add(total, keys_read.to(tl.int64) * READERS, sem="relaxed")
                tl.atomic_add(total + 1, count.to(tl.int64), sem="relaxed")


@dataclass(frozen=True)
class DeviceLists:
    """Memory for lists of tokens; see `TokenLists`.

    Attributes:
        tokens: `[max_queries * num_kv_heads, capacity]`, int32 positions, each once.
        log_weights: `[max_queries * num_kv_heads, capacity, width]`, float32; width is the units of
            a KV head. Capacity 0: every query head reads all tokens, with weight 1.
        counts: `[max_queries * num_kv_heads]`, int32, tokens of each list. What lies behind them is
            never read.
        tile_counts: `[max_queries * num_kv_heads, tiles]`, int32: scratch.
        tile_selected: `[max_queries * num_kv_heads * width, tiles]`, int32: scratch.
        unit_weights: `[max_queries * num_kv_heads * width]`, float32: scratch.
    """

    tokens: torch.Tensor
    log_weights: torch.Tensor
    counts: torch.Tensor
    tile_counts: torch.Tensor
    tile_selected: torch.Tensor
    unit_weights: torch.Tensor

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
            integers(lists, tiles),
            integers(lists * units, tiles),
            torch.empty(lists * units, dtype=torch.float32, device=device),
        )


def list_tokens(
    flags: torch.Tensor,
    lengths: torch.Tensor,
    lists: DeviceLists,
    probability: torch.Tensor | None = None,
    key_probability: torch.Tensor | None = None,
    only: int = 0,
    reads: torch.Tensor | None = None,
    readers: int = 1,
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
        reads: `[num_queries, 3]`, int64: to the first two columns of each query is added what
            attention over its lists will read: keys, over query heads, and rows of key and value,
            over lists.
        readers: Query heads of a unit.

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
    grid = (num_lists, programs_per_row(num_lists, capacity, _TILE) + 1)
    per_query = num_lists // len(lengths)
    _count_kernel[grid](
        flags,
        lengths,
        lists.counts if probability is None else probability,
        lists.unit_weights,
        lists.tile_counts,
        lists.tile_selected,
        capacity,
        tiles,
        LISTS=per_query,
        UNITS=units,
        HEADS=min(_HEADS, power_of_2(units)),
        FLAG=only,
        IS_COUNTED=reads is not None and units > 1,
        HAS_PROBABILITY=probability is not None,
        GROUPS=_GROUPS,
    )
    _list_kernel[grid](
        flags,
        lengths,
        lists.counts if key_probability is None else key_probability,
        lists.unit_weights,
        lists.tile_counts,
        lists.tile_selected,
        lists.tokens,
        lists.log_weights,
        lists.counts,
        lists.counts if reads is None else reads,
        capacity,
        lists.tokens.shape[1],
        0 if reads is None else reads.stride(0),
        tiles,
        LISTS=per_query,
        UNITS=units,
        HEADS=min(_HEADS, power_of_2(units)),
        FLAG=only,
        READERS=0 if reads is None else readers,
        IS_WEIGHTED=is_weighted,
        HAS_PROBABILITY=probability is not None,
        HAS_KEY_PROBABILITY=key_probability is not None,
        TILES=power_of_2(tiles),
        GROUPS=_GROUPS,
    )
