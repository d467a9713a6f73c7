"""Codes of a product quantiser: the bytes that the numba kernels store, tables and scores."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.plugin.paged.paged_rows import Rows, make_rows, shape_of
from tests.plugin.triton.interpreter import DEVICE
from tests.plugin.triton.paged_caches import (
    UNWRITTEN,
    Batch,
    assert_close_sums,
    assert_same_bytes,
    empty_scores,
    largest_products,
)
from tests.plugin.triton.row_order import for_device
from vllm_sparse_plugin.paged.centroid_codes import CentroidCodes, stored_codes
from vllm_sparse_plugin.paged.kernels import centroid_codes as numba_kernels
from vllm_sparse_plugin.paged.layout import BlockLayout
from vllm_sparse_plugin.paged.triton_kernels import centroid_codes, tiles
from vllm_sparse_plugin.paged.triton_kernels.cache_rows import DeviceBatch
from vllm_sparse_plugin.paged.triton_kernels.code_scores import score_codes

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# Heads, KV heads, head size, block size, type; channels of a sub-vector, bits of a code, and
# whether keys are small integers: with many ties, and sums that are exact in any order.
CASES = [
    ((1, 1, 32, 16, F32), 8, 4, True),
    ((4, 2, 64, 16, BF16), 32, 6, False),
    ((6, 2, 80, 32, F16), 16, 2, True),
    ((8, 2, 128, 16, BF16), 64, 3, True),
    ((7, 1, 64, 32, F32), 16, 8, False),
    ((8, 1, 32, 128, F16), 4, 1, False),
    ((6, 3, 80, 48, BF16), 80, 5, False),
]


@dataclass
class Short:
    """Sequences that lack codes, and their blocks as the numba kernel takes them.

    Attributes:
        tag: Of the first codebook; the second one's is the next number.
        lengths: Keys of each row that need codes; rows take turns with the codebooks.
    """

    tag: int
    lengths: list[int]

    def blocks(self, rows: Rows) -> tuple[np.ndarray, ...]:
        size = rows.cache.layout.shape.block_size
        found = [
            (rows.batch.block_table[row, block], min(size, length - block * size), row % 2)
            for row, length in enumerate(self.lengths)
            for block in range(-(-length // size))
        ]
        blocks, wanted, places = (np.array(column, np.int64) for column in zip(*found, strict=True))
        return blocks, wanted, places + self.tag, places

    def batch(self, rows: Rows) -> DeviceBatch:
        number = len(self.lengths)
        owners, places = torch.arange(number), torch.arange(number) % 2
        table = torch.from_numpy(rows.batch.block_table).to(DEVICE)
        others = (owners, torch.tensor(self.lengths), places)
        return DeviceBatch(table, *(other.int().to(DEVICE) for other in others))


def short_of(rows: Rows, tag: int, spare: int) -> Short:
    """All keys of all rows but the last ones."""
    return Short(tag, [max(0, keys.shape[2] - spare) for keys in rows.keys])


def encode(rows: Rows, index: CentroidCodes, short: Short, states: np.ndarray) -> None:
    shape, cache = rows.cache.layout.shape, rows.cache
    numba_kernels.encode_keys(
        cache.elements,
        shape.kind,
        cache.records,
        cache.layout.place_of(index),
        index.header_words(shape),
        index.codes_at(shape),
        index.stored_bits,
        shape.block_size,
        index.sub_dim,
        index.num_centroids,
        *short.blocks(rows),
        states,
        shape.head_size,
    )


def encode_on_device(
    layout: BlockLayout,
    index: CentroidCodes,
    kv_cache: torch.Tensor,
    batch: DeviceBatch,
    tag: int,
    states: np.ndarray,
    only_last: bool,
) -> None:
    shape = layout.shape
    tags = torch.tensor([tag, tag + 1], device=DEVICE)

    def launch(some: DeviceBatch, num_blocks: int | None) -> None:
        centroid_codes.encode_keys(
            kv_cache,
            layout.place_of(index),
            index.codes_at(shape),
            index.stored_bits,
            shape.head_size,
            index.sub_dim,
            index.num_centroids,
            some,
            tags,
            torch.from_numpy(states).to(DEVICE),
            num_blocks,
        )

    if only_last:
        launch(batch, None)
        return
    for row, length in enumerate(batch.lengths.tolist()):
        launch(batch.part(slice(row, row + 1)), -(-length // shape.block_size))


def scores_of(
    rows: Rows, index: CentroidCodes, kv_cache: torch.Tensor, states: np.ndarray
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of Triton and of numba; the last query is left out."""
    cache, batch = rows.cache, rows.batch
    shape, layout = cache.layout.shape, cache.layout
    count = len(rows.query)
    queries, places = np.arange(count - 1), np.arange(count) % 2
    group = shape.num_heads // shape.num_kv_heads
    size = (shape.num_kv_heads, index.num_parts(shape), index.num_centroids, group)
    tables = np.zeros((count - 1, *size), np.float32)
    numba_kernels.fill_tables(
        rows.query.float().numpy(),
        queries,
        places,
        states,
        shape.num_kv_heads,
        index.sub_dim,
        tables,
    )
    expected = empty_scores(rows).cpu().numpy()
    place = layout.place_of(index, index.codes_at(shape))
    numba_kernels.score_codes(
        tables,
        queries,
        cache.records,
        place,
        index.stored_bits,
        shape.block_size,
        batch.block_table,
        batch.rows,
        batch.lengths,
        expected,
    )
    on_device, found = Batch.of(rows), empty_scores(rows)
    own_tables = torch.full((count, *size), torch.nan, device=DEVICE)
    own_places = torch.from_numpy(np.where(np.arange(count) < count - 1, places, -1)).int()
    centroid_codes.fill_tables(
        rows.query.to(DEVICE),
        own_places.to(DEVICE),
        torch.from_numpy(states).to(DEVICE),
        index.sub_dim,
        own_tables,
    )
    assert own_tables[-1].isnan().all()
    seen = on_device.lengths.clone()
    seen[-1] = 0
    score_codes(
        own_tables,
        kv_cache,
        place,
        index.stored_bits,
        on_device.block_table,
        on_device.rows,
        seen,
        found,
    )
    return found.cpu(), torch.from_numpy(expected)


@pytest.mark.parametrize(("sizes", "sub_dim", "bits", "exact"), CASES, ids=str)
def test_bytes_and_scores(
    sizes: tuple, sub_dim: int, bits: int, exact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "PROGRAMS", 3)  # some rows have more tiles than programs
    monkeypatch.setattr(tiles, "TILE_NUMBERS", 512)
    index = CentroidCodes(sub_dim, bits, 1)
    shape = shape_of(*sizes)
    layout = BlockLayout(shape, (index,))
    rows = make_rows(layout, (0, 1, shape.block_size + 1, 5), exact=exact, spare_keys=2)
    kv_cache = for_device(rows.kv_cache, shape)
    # Two codebooks, of some keys, and of fewer keys than there are centroids.
    keys = rows.keys[2][:, :, :16].float()
    states = np.stack([index.learn(keys).ravel(), index.learn(keys[:, :, 3:4]).ravel()])
    # Some tokens of each block first, one more, then the others; then all with another tag.
    for tag, spare, only_last in ((11, 9, False), (11, 8, True), (11, 0, False), (90, 0, False)):
        short = short_of(rows, tag, spare)
        encode(rows, index, short, states)
        encode_on_device(layout, index, kv_cache, short.batch(rows), tag, states, only_last)
        assert_same_bytes(rows, kv_cache)
    found, expected = scores_of(rows, index, kv_cache, states)
    written = expected != UNWRITTEN
    assert torch.equal(found != UNWRITTEN, written)
    assert not written[-1].any()
    # In the same order: they differ where one of the processors does not fuse products and sums.
    most = torch.where(written, largest_products(rows).max(), 0.0)
    assert_close_sums(found, expected, most, shape.head_size)


@settings(deadline=None, max_examples=15)
@given(
    key=st.lists(st.integers(-20, 20), min_size=8, max_size=8),
    centroids=st.lists(
        st.lists(st.integers(-20, 20), min_size=4, max_size=4), min_size=1, max_size=8
    ),
    again=st.integers(1, 3),
)
def test_any_key_gets_its_nearest_centroids(
    key: list[int], centroids: list[list[int]], again: int
) -> None:
    """In whole numbers, where ties are ties: the lower code wins, and absent centroids never."""
    centroids = (centroids * again)[:8]
    index = CentroidCodes(4, 3, 1)
    layout = BlockLayout(shape_of(1, 1, 8, 16), (index,))
    rows = make_rows(layout, (1,))
    keys = torch.tensor(key).float()
    kv_cache = rows.kv_cache.clone()
    block = int(rows.batch.block_table[0, 0])
    kv_cache[block].view(-1)[:8] = keys
    books = torch.tensor(centroids).float()
    state = torch.zeros(2, 5, 8)
    state[:, :4, : len(centroids)] = books.T
    state[:, 4] = torch.inf
    state[:, 4, : len(centroids)] = books.square().sum(-1)
    kv_cache = kv_cache.to(DEVICE)
    batch = Short(5, [1]).batch(rows)
    encode_on_device(layout, index, kv_cache, batch, 5, state.reshape(1, -1).numpy(), False)
    cache = type(rows.cache).of(kv_cache.cpu(), layout, 0)
    distances = (books[None] - keys.view(2, 1, 4)).square().sum(-1)
    expected = [row.index(min(row)) for row in distances.tolist()]
    assert stored_codes(index, cache)[block, 0, 0].tolist() == expected
