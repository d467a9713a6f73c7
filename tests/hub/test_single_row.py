"""Decode steps select by index: the same keys, and the same output, as the general form."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_attention_hub.sparse_attention import (
    AdaptiveSamplingMaskerConfig,
    LocalMaskerConfig,
    MagicPigConfig,
    Mask,
    OracleTopKConfig,
    RandomSamplingMaskerConfig,
    ResearchAttention,
    ResearchAttentionConfig,
    SinkMaskerConfig,
)
from sparse_attention_hub.sparse_attention.research_attention.maskers.base import ResearchMasker
from sparse_attention_hub.sparse_attention.utils.mask_attention_utils import (
    get_masked_attention_output,
)
from sparse_attention_hub.sparse_attention.utils.row_attention import attend_rows
from tests.hub.top_k_maskers import NAMES, tensors, top_k_configs
from tests.tolerances import ATTENTION_ATOL

SHAPES = [(1, 1, 1, 1), (2, 3, 1, 7), (1, 4, 2, 33), (3, 8, 1, 64), (1, 3, 3, 130), (2, 8, 2, 257)]
LONG = (1, 4, 2, 2500)
SAMPLERS = {
    "random": RandomSamplingMaskerConfig(0.2),
    "adaptive": AdaptiveSamplingMaskerConfig(0.1, 0.3, 0.2, 2, 0.05),
    "magic pig": MagicPigConfig(lsh_l=12, lsh_k=3),
    "random, per KV head": RandomSamplingMaskerConfig(0.2, head_granularity="kv_head"),
    "adaptive, per KV head": AdaptiveSamplingMaskerConfig(
        0.1, 0.3, 0.2, 2, 0.05, head_granularity="kv_head"
    ),
}


def both_forms(config: ResearchAttentionConfig, query, key, value):
    """The mask without an attention mask, and with one that hides nothing."""
    attention = ResearchAttention.create_from_config(config)
    everything = torch.zeros(query.shape[0], 1, 1, key.shape[2])
    rest = (0.25, 0.0)
    by_index = attention.select(query, key, value, None, *rest, {}, layer_idx=1)
    general = attention.select(query, key, value, everything, *rest, {}, layer_idx=1)
    return by_index, general


@pytest.mark.parametrize("granularity", ["query_head", "kv_head"])
@pytest.mark.parametrize("size", [1, 6, 0.1, 0.5, 500])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_top_k_maskers(name, shape, size, granularity, tmp_path) -> None:
    batch, heads, kv_heads, keys = shape
    query, key, value = tensors(batch, heads, kv_heads, 1, keys)
    config = top_k_configs(tmp_path, heads, size, granularity)[name]
    oracle = OracleTopKConfig(0.1)  # leaves each head with something else
    for before in (
        [],
        [SinkMaskerConfig(2), LocalMaskerConfig(0.1)],
        [SinkMaskerConfig(3), oracle],
    ):
        by_index, general = both_forms(
            ResearchAttentionConfig([*before, config]), query, key, value
        )
        assert torch.equal(by_index.get_dense_mask(), general.get_dense_mask())
        assert by_index.count_active() == general.count_active()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("granularity", ["query_head", "kv_head"])
@pytest.mark.parametrize("name", NAMES)
def test_top_k_maskers_on_long_rows_in_every_dtype(name, granularity, dtype, tmp_path) -> None:
    query, key, value = (part.to(dtype) for part in tensors(*LONG[:3], 1, LONG[3]))
    config = top_k_configs(tmp_path, LONG[1], 0.05, granularity)[name]
    before = [SinkMaskerConfig(4), LocalMaskerConfig(32)]
    by_index, general = both_forms(ResearchAttentionConfig([*before, config]), query, key, value)
    assert torch.equal(by_index.get_dense_mask(), general.get_dense_mask())
    assert by_index.dtype == torch.float32
    if name != "quest":  # it reads whole pages
        assert by_index.count_active() == 4 * (36 + 125)


@pytest.mark.parametrize("name", [*NAMES, *SAMPLERS])
def test_full_and_empty_previous_masks(name, tmp_path) -> None:
    query, key, value = tensors(1, 4, 2, 1, 40)
    config = {**top_k_configs(tmp_path, 4, 5), **SAMPLERS}[name]
    masker = ResearchMasker.create_masker_from_config(config)
    full = Mask.create_full_mask((1, 4, 1, 40), torch.float32, query.device)
    assert masker.add_mask(key, query, value, None, 0.25, 0.0, {}, full, layer_idx=0) is full
    empty = Mask.create_empty_mask((1, 4, 1, 40), torch.float32, query.device)
    zeros = Mask.create_mask_from_dense_mask((1, 4, 1, 40), torch.zeros(1, 4, 1, 40), torch.float32)
    ones = Mask.create_mask_from_dense_mask((1, 4, 1, 40), torch.ones(1, 4, 1, 40), torch.float32)
    first, second = (
        masker.add_mask(
            key, query, value, None, 0.25, 0.0, {}, previous, layer_idx=0
        ).get_dense_mask()
        for previous in (empty, zeros)
    )
    assert torch.equal(first, second)
    assert empty.is_empty_mask()
    assert not zeros.get_dense_mask().any()
    added = masker.add_mask(key, query, value, None, 0.25, 0.0, {}, ones, layer_idx=0)
    assert torch.equal(added.get_dense_mask(), torch.ones(1, 4, 1, 40))


@pytest.mark.parametrize("shape", [*SHAPES, LONG])
@pytest.mark.parametrize("name", SAMPLERS)
def test_sampling_maskers(name, shape) -> None:
    batch, heads, kv_heads, keys = shape
    query, key, value = tensors(batch, heads, kv_heads, 1, keys)
    for before in ([], [SinkMaskerConfig(2), LocalMaskerConfig(4), OracleTopKConfig(0.1)]):
        by_index, general = both_forms(
            ResearchAttentionConfig([*before, SAMPLERS[name]]), query, key, value
        )
        assert torch.equal(by_index.get_dense_mask(), general.get_dense_mask())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_attention_reads_the_listed_keys(shape, dtype) -> None:
    batch, heads, kv_heads, keys = shape
    query, key, value = (part.to(dtype) for part in tensors(batch, heads, kv_heads, 1, keys))
    config = ResearchAttentionConfig(
        [SinkMaskerConfig(1), OracleTopKConfig(0.3), RandomSamplingMaskerConfig(0.2)]
    )
    by_index, general = both_forms(config, query, key, value)
    everything = torch.zeros(batch, 1, 1, keys)
    arguments = (query, key, value)
    found = get_masked_attention_output(None, *arguments, None, 0.25, 0.0, by_index)
    expected = get_masked_attention_output(None, *arguments, everything, 0.25, 0.0, general)
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected, atol=ATTENTION_ATOL[dtype], rtol=0)
    strided = value.transpose(1, 2).contiguous().transpose(1, 2)  # as pages are gathered
    again = get_masked_attention_output(None, query, key, strided, None, 0.25, 0.0, by_index)
    torch.testing.assert_close(again, expected, atol=ATTENTION_ATOL[dtype], rtol=0)


def test_a_row_without_keys_gives_zeros() -> None:
    query, key, value = tensors(1, 2, 1, 1, 5)
    none = torch.empty(1, 2, 1, 0, dtype=torch.int64), torch.empty(1, 2, 1, 0)
    padding = torch.zeros(1, 2, 1, 3, dtype=torch.int64), torch.zeros(1, 2, 1, 3)
    for rows in (none, padding):
        assert torch.equal(attend_rows(query, key, value, 1.0, *rows), torch.zeros(1, 1, 2, 16))


def test_scores_far_below_keys_that_are_not_selected_do_not_underflow() -> None:
    """A maximum over all keys instead of the selected ones would make this 0 / 0."""
    query = torch.ones(1, 1, 1, 16)
    key = torch.zeros(1, 1, 4, 16)
    key[0, 0, 3] = 100.0
    value = torch.arange(4.0).view(1, 1, 4, 1).expand(-1, -1, -1, 16)
    rows = torch.tensor([0, 1]).view(1, 1, 1, 2), torch.ones(1, 1, 1, 2)
    assert attend_rows(query, key, value, 1.0, *rows).flatten()[0].item() == pytest.approx(0.5)


@settings(max_examples=60, deadline=None)
@given(
    keys=st.integers(1, 40),
    ranges=st.lists(st.tuples(st.integers(1, 45), st.integers(1, 45)), max_size=3),
    count=st.integers(1, 45),
    seed=st.integers(0, 1000),
)
def test_any_overlap_of_ranges_and_top_k(keys, ranges, count, seed) -> None:
    query, key, value = tensors(1, 4, 2, 1, keys, seed)
    key = key.round()  # ties
    configs = [c for s, w in ranges for c in (SinkMaskerConfig(s), LocalMaskerConfig(w))]
    config = ResearchAttentionConfig([*configs, OracleTopKConfig(count), *configs])
    by_index, general = both_forms(config, query.round(), key, value)
    assert torch.equal(by_index.get_dense_mask(), general.get_dense_mask())
    rows = by_index.rows()
    if rows is not None:  # each key once
        for indices, weights in zip(*(part.flatten(0, 2) for part in rows), strict=True):
            read = indices[weights > 0].tolist()
            assert len(read) == len(set(read))


def test_the_caller_s_mask_stays_as_it_was() -> None:
    query, key, value = tensors(1, 2, 1, 1, 20)
    attention = ResearchAttention.create_from_config(
        ResearchAttentionConfig([SinkMaskerConfig(2), OracleTopKConfig(3), LocalMaskerConfig(4)])
    )
    mask = Mask.create_empty_mask((1, 2, 1, 20), torch.float32, query.device)
    seen = []
    for masker in attention.maskers:
        before = mask.get_dense_mask()
        after = masker.add_mask(key, query, value, None, 1.0, 0.0, {}, mask)
        assert torch.equal(mask.get_dense_mask(), before)
        seen.append(after.count_active())
        mask = after
    assert seen == sorted(seen)
