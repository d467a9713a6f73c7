"""The index of Quest: what the keys of each whole page give, never stale."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_attention_hub.sparse_attention.research_attention.maskers.fixed.implementations.utils.common_utils import (  # noqa: E501
    pseudo_quantize,
)
from tests.plugin.paged.paged_rows import make_rows, shape_of
from vllm_sparse_plugin.paged.layout import BlockLayout, BlockShape, LayerCache
from vllm_sparse_plugin.paged.page_bounds import STORED_BITS, PageBounds, stored_bounds


def expected_bounds(key: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of one page's keys `[n, head_size]`, as they would be stored."""
    low, high = key.float().amin(dim=0), key.float().amax(dim=0)
    return pseudo_quantize(low, bits), pseudo_quantize(high, bits)


def check(index: PageBounds, cache: LayerCache, blocks, keys: torch.Tensor) -> None:
    """Compares every whole page; `keys` is `[1, num_kv_heads, length, head_size]`."""
    shape = cache.layout.shape
    low, high = stored_bounds(index, cache)
    for start in range(0, keys.shape[2] - index.page_size + 1, index.page_size):
        block = int(blocks[start // shape.block_size])
        page = start % shape.block_size // index.page_size
        for head in range(shape.num_kv_heads):
            wanted = expected_bounds(
                keys[0, head, start : start + index.page_size], index.label_bits
            )
            assert torch.equal(low[block, head, page], wanted[0])
            assert torch.equal(high[block, head, page], wanted[1])


@pytest.mark.parametrize("bits", STORED_BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("page_size", [8, 16, 32])
def test_rebuilt_from_the_keys_it_is_the_same(bits, dtype, page_size) -> None:
    index = PageBounds(page_size, bits)
    rows = make_rows(BlockLayout(shape_of(dtype=dtype), (index,)), exact=False)
    for row, keys in enumerate(rows.keys):
        check(index, rows.cache, rows.batch.block_table[row], keys)


@settings(deadline=None, max_examples=40)
@given(
    steps=st.lists(
        st.tuples(st.integers(0, 3), st.integers(1, 40), st.booleans()), min_size=1, max_size=25
    ),
    seed=st.integers(0, 1000),
)
def test_after_any_history_of_writes_and_reuse(steps, seed) -> None:
    """Sequences grow in chunks, end, and give their blocks to others with other content."""
    first, second = PageBounds(8, 16), PageBounds(16, 4)
    shape = shape_of(heads=2, kv_heads=2, head_size=8)
    layout = BlockLayout(shape, (first, second))
    width = layout.bytes_per_token // 4
    kv_cache = torch.full((24, 2, 32, width), torch.nan)
    cache = LayerCache.of(kv_cache, layout, 0)
    generator = torch.Generator().manual_seed(seed)
    free = list(range(24))
    blocks: list[list[int]] = [[] for _ in range(4)]
    keys = [torch.empty(0, 2, 8) for _ in range(4)]
    for sequence, count, restart in steps:
        if restart or len(keys[sequence]) + count > 6 * 32:
            free = blocks[sequence] + free  # the next to be used
            blocks[sequence], keys[sequence] = [], torch.empty(0, 2, 8)
        old = len(keys[sequence])
        while len(blocks[sequence]) * 32 < old + count:
            blocks[sequence].append(free.pop(0))
        new = torch.randn(count, 2, 8, generator=generator)
        place = torch.arange(old, old + count)
        slots = torch.tensor(blocks[sequence])[place // 32] * 32 + place % 32
        cache.write(new, new, slots)
        keys[sequence] = torch.cat([keys[sequence], new])
        for owned, key in zip(blocks, keys, strict=True):
            for index in (first, second):
                check(index, cache, owned, key.transpose(0, 1)[None])


@pytest.mark.parametrize(
    ("index", "reason"),
    [
        (PageBounds(8, 5), "label_bits 5 is none of"),
        (PageBounds(24, 16), "page_size 24 does not divide the block size 32"),
        (PageBounds(8, 2), "3 channels of 2 bits"),
    ],
)
def test_what_blocks_cannot_hold(index: PageBounds, reason: str) -> None:
    shape = BlockShape(32, 1, 1, 3 if "channels" in reason else 32, torch.float32)
    assert reason in (index.reason_against(shape) or "")


def test_the_layout_accounts_for_every_byte() -> None:
    shape = shape_of(head_size=64, block_size=128)
    indices = (PageBounds(16, 16), PageBounds(16, 8), PageBounds(32, 2))
    layout = BlockLayout(shape, indices)
    sizes = [8 * 2 * 64 * 4, 8 * (16 + 2 * 64), 4 * (16 + 2 * 16)]
    offsets, strides = zip(*map(layout.place_of, indices), strict=True)
    heads = shape.num_kv_heads
    assert strides == tuple(sizes)
    assert offsets[0] == heads * 128 * 2 * 64 * 4
    assert [b - a for a, b in itertools.pairwise(offsets)] == [heads * size for size in sizes[:2]]
    assert layout.bytes_per_token % 4 == 0
    assert heads * layout.bytes_per_token * 128 >= offsets[-1] + heads * sizes[-1]
    assert layout.index_bytes_per_token == -(-sum(sizes) // 128 // 4) * 4
    assert BlockLayout(shape).index_bytes_per_token == 0


def test_a_cache_without_room_is_refused() -> None:
    layout = BlockLayout(shape_of(), (PageBounds(8, 16),))
    with pytest.raises(ValueError, match=r"must be contiguous \[\*, 2, 32, >= 72\]"):
        LayerCache.of(torch.zeros(4, 2, 32, 64), layout, 0)
    for width in (72, 80):
        cache = LayerCache.of(torch.zeros(4, 2, 32, width), layout, 0)
        assert isinstance(cache.records, np.ndarray)
