"""Rows of keys in scattered blocks of a cache on the device; see `paged_rows`."""

from dataclasses import dataclass

import torch

from tests.plugin.paged.paged_rows import Rows, make_rows
from tests.plugin.triton.interpreter import DEVICE
from tests.plugin.triton.row_order import for_device
from vllm_sparse_plugin.paged.layout import BlockLayout, BlockShape
from vllm_sparse_plugin.paged.triton_kernels.cache_rows import DeviceBatch

PADDING = 1
"""Queries of length 0 behind the others, whose rows are not in the block table."""


@dataclass
class DeviceRows:
    """The host's rows, and the same on the device, with padding."""

    host: Rows
    kv_cache: torch.Tensor
    batch: DeviceBatch
    query: torch.Tensor
    lengths: list[int]


def device_rows(
    shape: BlockShape, lengths: tuple[int, ...], seed: int = 0, **options
) -> DeviceRows:
    rows = make_rows(BlockLayout(shape), lengths, seed, **options)
    return on_device(rows)


def on_device(rows: Rows) -> DeviceRows:
    lengths = rows.batch.lengths.tolist()
    padding = torch.full((PADDING,), 1 << 28, dtype=torch.int32)
    owners = torch.cat([torch.from_numpy(rows.batch.rows), padding])
    seen = torch.tensor([*lengths, *[0] * PADDING], dtype=torch.int32)
    nothing = rows.query.new_full((PADDING, *rows.query.shape[1:]), torch.nan)
    query = torch.cat([rows.query, nothing])
    table = torch.from_numpy(rows.batch.block_table)
    return DeviceRows(
        rows,
        for_device(rows.kv_cache, rows.cache.layout.shape),
        DeviceBatch(table.to(DEVICE), owners.to(DEVICE), seen.to(DEVICE)),
        query.to(DEVICE),
        seen.tolist(),
    )


def permuted(rows: DeviceRows, seed: int = 7) -> DeviceRows:
    """The same sequences in other blocks."""
    generator = torch.Generator().manual_seed(seed)
    place = torch.randperm(len(rows.kv_cache), generator=generator)
    cache = torch.empty_like(rows.kv_cache)
    cache[place.to(DEVICE)] = rows.kv_cache
    table = rows.batch.block_table.cpu()
    is_block = table < len(place)
    moved = torch.where(is_block, place[table.long() * is_block], table).to(torch.int32)
    batch = DeviceBatch(moved.to(DEVICE), rows.batch.rows, rows.batch.lengths)
    return DeviceRows(rows.host, cache, batch, rows.query, rows.lengths)
