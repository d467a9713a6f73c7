"""PQCache on pages: the codes that the masker makes, and the keys that it selects."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_attention_hub.sparse_attention.research_attention.maskers.fixed import PQCacheConfig
from sparse_attention_hub.sparse_attention.research_attention.maskers.fixed.implementations.pq_top_k import (  # noqa: E501
    learned_codebook,
    nearest_centroids,
)
from tests.plugin.paged.label_rows import (
    assert_independent_rows,
    assert_same_keys,
    assert_same_scores,
    assert_same_with_threads,
    slots_of,
)
from tests.plugin.paged.paged_rows import (
    SINK_LOCAL,
    attend,
    make_rows,
    paged_attention,
    shape_of,
)
from vllm_sparse_plugin.paged.centroid_codes import CentroidCodes, stored_codes
from vllm_sparse_plugin.paged.kernels.centroid_codes import encode_keys
from vllm_sparse_plugin.paged.layout import BlockLayout, LayerCache
from vllm_sparse_plugin.paged.learned_index import stored_headers
from vllm_sparse_plugin.paged.maskers.base import Unsupported

pytestmark = pytest.mark.usefixtures("one_thread")


def config(granularity: str = "query_head", **fields) -> dict:
    return {
        "type": "pq_cache",
        "heavy_size": 0.15,
        "head_granularity": granularity,
        "pq_sub_dim": 8,
        "pq_bits": 4,
        "kmeans_iterations": 3,
        **fields,
    }


@pytest.mark.parametrize("granularity", ["query_head", "kv_head"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "block_size", "sub_dim", "bits"),
    [
        (8, 2, 32, 8, 4),
        (9, 3, 128, 16, 8),
        (3, 3, 128, 4, 2),
        (10, 2, 16, 32, 5),  # 4 heads and one more; one sub-vector
        (4, 1, 48, 2, 1),
    ],
)
def test_same_keys(granularity, heads, kv_heads, block_size, sub_dim, bits) -> None:
    """Few centroids: many keys with the same codes, so that place decides."""
    maskers = [*SINK_LOCAL, config(granularity, pq_sub_dim=sub_dim, pq_bits=bits)]
    # A key may be as near to two means of keys as float noise.
    assert_same_keys(maskers, near_ties=1, heads=heads, kv_heads=kv_heads, block_size=block_size)


@pytest.mark.parametrize("granularity", ["query_head", "kv_head"])
def test_same_keys_of_random_numbers(granularity) -> None:
    assert_same_keys([*SINK_LOCAL, config(granularity)], exact=False, near_ties=1)


@pytest.mark.parametrize(
    "fields", [{"heavy_size": 40}, {"heavy_size": 1.0}, {"kmeans_iterations": 1}], ids=str
)
def test_other_fields(fields) -> None:
    assert_same_keys([config(**fields)], near_ties=1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype) -> None:
    assert_same_keys([*SINK_LOCAL, config("kv_head")], near_ties=1, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("sub_dim", "bits"), [(8, 8), (16, 3)])
def test_same_scores(dtype, sub_dim, bits) -> None:
    assert_same_scores(PQCacheConfig(0.1, pq_sub_dim=sub_dim, pq_bits=bits), dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("sub_dim", "bits"), [(8, 4), (16, 8), (4, 3), (32, 1)])
@pytest.mark.parametrize("exact", [True, False])
def test_the_index_holds_the_reference_s_codes(dtype, sub_dim, bits, exact) -> None:
    """Of each sequence's own codebook, however its keys came."""
    maskers = [config(pq_sub_dim=sub_dim, pq_bits=bits)]
    attention, layout = paged_attention(maskers, shape_of(dtype=dtype))
    rows = make_rows(layout, exact=exact)
    attend(attention, rows)
    [index] = layout.indices
    assert isinstance(index, CentroidCodes)
    stored, (counts, _) = stored_codes(index, rows.cache), stored_headers(index, rows.cache)
    different = total = 0
    for row, keys in enumerate(rows.keys):
        length = keys.shape[2]
        prefix = keys[:, :, : 1 << (length.bit_length() - 1)]
        codebook = learned_codebook(prefix, sub_dim, bits, 3)
        expected = nearest_centroids(keys, codebook)[0].transpose(0, 1).long()
        slots = slots_of(rows, row)
        block, place = slots // 32, slots % 32
        found = stored[block, :, place]
        different += int((found != expected).sum())
        total += found.numel()
        assert (counts[block] > place[:, None]).all()
    # Float noise: a key that is as near to two centroids.
    assert different <= total // 2000


@settings(deadline=None, max_examples=60)
@given(
    key=st.lists(st.integers(-20, 20), min_size=8, max_size=8),
    centroids=st.lists(
        st.lists(st.integers(-20, 20), min_size=4, max_size=4), min_size=1, max_size=8
    ),
)
def test_any_key_gets_its_nearest_centroids(key, centroids) -> None:
    """In whole numbers, where ties are ties: the lower code wins, and absent centroids never."""
    index = CentroidCodes(4, 3, 1)
    shape = shape_of(1, 1, 8)
    cache = _cache_of_one_block(index, torch.tensor(key).float())
    books = torch.tensor(centroids).float().expand(1, 1, 2, -1, -1)
    state = torch.zeros(2, 5, 8)
    state[:, :4, : len(centroids)] = books[0, 0].transpose(1, 2)
    state[:, 4, : len(centroids)] = books[0, 0].square().sum(-1)
    state[:, 4, len(centroids) :] = torch.inf
    encode_keys(
        cache.elements,
        shape.kind,
        cache.records,
        cache.layout.place_of(index),
        index.header_words(shape),
        index.codes_at(shape),
        index.stored_bits,
        shape.block_size,
        4,
        8,
        np.zeros(1, np.int64),
        np.ones(1, np.int64),
        np.array([77]),
        np.array([0]),
        state.reshape(1, -1).numpy(),
        8,
    )
    expected = nearest_centroids(torch.tensor(key).float().view(1, 1, 1, 8), books[0])
    assert stored_codes(index, cache)[0, 0, 0].tolist() == expected[0, 0, 0].tolist()
    counts, tags = stored_headers(index, cache)
    assert (counts.item(), tags.item()) == (1, 77)


def _cache_of_one_block(index: CentroidCodes, key: torch.Tensor) -> LayerCache:
    shape = shape_of(1, 1, len(key))
    layout = BlockLayout(shape, (index,))
    kv_cache = torch.full((1, 1, shape.block_size, layout.bytes_per_token // 4), torch.nan)
    cache = LayerCache.of(kv_cache, layout, 0)
    cache.write(key[None, None], key[None, None], torch.tensor([0]))
    return cache


def test_many_centroids_of_long_sequences() -> None:
    """The reference's codebook, bit for bit, where it looks at keys in pieces."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(1, 2, 2048, 32, generator=generator)
    index = CentroidCodes(8, 8, 2)
    state = torch.from_numpy(index.learn(keys)).view(2, 4, 9, 256)
    expected = learned_codebook(keys.transpose(1, 2).contiguous().transpose(1, 2), 8, 8, 2)[0]
    assert torch.equal(state[..., :8, :], expected.transpose(2, 3))
    assert torch.equal(state[..., 8, :], expected.square().sum(-1))


def test_the_number_of_threads_does_not_matter() -> None:
    assert_same_with_threads([*SINK_LOCAL, config("kv_head")])


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    assert_independent_rows([*SINK_LOCAL, config("kv_head")])


def test_bytes_per_block() -> None:
    """A line for the header, and codes in 1, 2, 4 or 8 bits."""
    shape = shape_of()
    found = {
        (sub_dim, bits): CentroidCodes(sub_dim, bits, 1).bytes_per_block(shape) - 64
        for sub_dim in (8, 16, 32)
        for bits in (1, 3, 4, 8)
    }
    per_token = {8: (1, 2, 2, 4), 16: (1, 1, 1, 2), 32: (1, 1, 1, 1)}
    assert found == {
        (sub_dim, bits): 32 * size
        for sub_dim, sizes in per_token.items()
        for bits, size in zip((1, 3, 4, 8), sizes, strict=True)
    }


def test_a_width_that_does_not_divide_the_head_size_has_no_counterpart() -> None:
    with pytest.raises(Unsupported, match="pq_cache: pq_sub_dim 5 does not divide .* size 32"):
        paged_attention([config(pq_sub_dim=5)], shape_of())
