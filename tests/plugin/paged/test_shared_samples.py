"""Samples that query heads of a KV head share, on pages: keys and weights are the reference's."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_attention_hub.sparse_attention.serialization import config_from_dict, config_to_json
from tests.plugin.paged.label_rows import assert_independent_rows
from tests.plugin.paged.paged_rows import (
    SINK_LOCAL,
    Rows,
    attend,
    general,
    make_rows,
    paged_attention,
    shape_of,
)
from tests.tolerances import ATTENTION_ATOL
from vllm_sparse_plugin.masked_attention import attention_of
from vllm_sparse_plugin.paged.kernels.group_flags import pool_flags, spread_flags
from vllm_sparse_plugin.paged.token_lists import TokenLists

LENGTHS = (1, 2, 3, 8, 31, 32, 33, 97, 300, 700)
SCALING = 0.25  # of a head size of 16: scaled scores are exact
QUEST = {"type": "quest_top_k", "heavy_size": 0.1, "page_size": 8, "head_granularity": "kv_head"}
ORACLE = {"type": "oracle_top_k", "heavy_size": 9}
RANDOM = {"type": "random_sampling", "sampling_rate": 0.2, "head_granularity": "kv_head"}
ADAPTIVE = {
    "type": "adaptive_sampling",
    "base_rate_sampling": 0.05,
    "epsilon": 0.2,
    "delta": 0.2,
    "init_offset": 4,
    "local_offset": 0.05,
    "head_granularity": "kv_head",
}
OTHERS = {
    "alone": ([], []),
    "after sink and local": (SINK_LOCAL, []),
    "after a group's Quest": ([*SINK_LOCAL, QUEST], []),
    "after an oracle of query heads": ([*SINK_LOCAL, ORACLE], []),
    "before an oracle of query heads": (SINK_LOCAL, [ORACLE]),
    "before a group's Quest": ([], [QUEST]),
    "everything is selected": ([{"type": "sink", "sink_size": 1.0}], []),
}
SAMPLERS = {
    "random": RANDOM,
    "random, everything": RANDOM | {"sampling_rate": 1.0},
    "adaptive": ADAPTIVE,
    "adaptive, large budgets": ADAPTIVE | {"base_rate_sampling": 2, "epsilon": 0.02},
    "adaptive, large base samples": ADAPTIVE | {"base_rate_sampling": 64},
}


def selected_by_heads(attention, rows: Rows) -> np.ndarray:
    """Probabilities `[num_queries, num_heads, capacity]` with which visible keys were selected."""
    queries = attention._select(rows.query.float().numpy(), rows.cache, rows.batch, SCALING)
    table = np.stack([np.zeros_like(queries.probability), np.ones_like(queries.probability)], 1)
    table = np.concatenate([table, queries.probability[:, None]], axis=1)
    flags = queries.flags.astype(np.int64) % 3  # anything may be behind a query's keys
    weights = np.take_along_axis(table, flags, axis=1)
    units = len(weights) // len(rows.batch.lengths)
    weights = weights.reshape(len(rows.batch.lengths), units, -1)
    weights *= np.arange(weights.shape[2]) < rows.batch.lengths[:, None, None]
    return weights.repeat(attention.shape.num_heads // units, axis=1)


def assert_same_selection(maskers: list[dict], attention, rows: Rows) -> None:
    reference = attention_of(config_to_json(config_from_dict({"maskers": maskers})))
    found = selected_by_heads(attention, rows)
    for row, length in enumerate(rows.batch.lengths.tolist()):
        query, keys = rows.query[row][None, :, None], rows.keys[row][:, :, :length]
        mask = reference.select(
            query, keys, keys, None, SCALING, 0.0, {}, layer_idx=rows.cache.layer_index
        )
        expected = mask.get_dense_mask()[0, :, 0].float().numpy()
        assert ((found[row, :, :length] > 0) == (expected > 0)).all()
        np.testing.assert_allclose(found[row, :, :length], expected, rtol=1e-5)


@pytest.mark.parametrize("place", OTHERS)
@pytest.mark.parametrize("name", SAMPLERS)
def test_same_selection_and_output_as_the_reference(name: str, place: str) -> None:
    before, after = OTHERS[place]
    maskers = [*before, SAMPLERS[name], *after]
    attention, layout = paged_attention(maskers, shape_of(head_size=16))
    rows = make_rows(layout, LENGTHS, seed=1, layer_index=5, spare_keys=3)
    rows.query /= 16  # otherwise single keys are everything, and no budget lies in between
    assert_same_selection(maskers, attention, rows)
    output, read = attend(attention, rows)
    expected, counts = general(maskers, rows)
    assert read.keys.tolist() == counts
    assert (output - expected).abs().max() <= ATTENTION_ATOL[torch.float32]


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (3, 3), (9, 3), (8, 1)])
@pytest.mark.parametrize("sampler", [RANDOM, ADAPTIVE], ids=["random", "adaptive"])
@pytest.mark.parametrize("other", [QUEST, ORACLE], ids=["KV heads", "query heads"])
def test_groups_and_seeds(heads: int, kv_heads: int, sampler: dict, other: dict) -> None:
    for seed in (0, 2**63 - 1):
        maskers = [*SINK_LOCAL, other, sampler | {"seed": seed}]
        attention, layout = paged_attention(maskers, shape_of(heads, kv_heads, 16))
        rows = make_rows(layout, LENGTHS, seed=2)
        rows.query /= 16
        assert_same_selection(maskers, attention, rows)
        output, _ = attend(attention, rows)
        assert (output - general(maskers, rows)[0]).abs().max() <= ATTENTION_ATOL[torch.float32]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sampler", [RANDOM, ADAPTIVE], ids=["random", "adaptive"])
def test_half_precision(dtype: torch.dtype, sampler: dict) -> None:
    maskers = [*SINK_LOCAL, QUEST, sampler]
    attention, layout = paged_attention(maskers, shape_of(head_size=16, dtype=dtype))
    rows = make_rows(layout, LENGTHS)
    rows.query /= 16
    output, read = attend(attention, rows)
    expected, counts = general(maskers, rows)
    assert read.keys.tolist() == counts
    # The reference keeps probabilities in the keys' type.
    assert (output - expected).abs().max() <= 2 * ATTENTION_ATOL[dtype]


@pytest.mark.parametrize("sampler", [RANDOM, ADAPTIVE], ids=["random", "adaptive"])
@pytest.mark.parametrize("other", [QUEST, ORACLE], ids=["KV heads", "query heads"])
def test_a_row_does_not_depend_on_its_neighbours(sampler: dict, other: dict) -> None:
    assert_independent_rows([*SINK_LOCAL, other, sampler])


def test_units_are_kv_heads_when_nobody_selects_per_query_head() -> None:
    for sampler in (RANDOM, ADAPTIVE):
        for other, units in ((QUEST, 2), (ORACLE, 8)):
            attention, layout = paged_attention([other, sampler], shape_of())
            rows = make_rows(layout, (40, 9))
            queries = attention._select(rows.query.numpy(), rows.cache, rows.batch, 1.0)
            assert queries.flags.shape[0] == queries.probability.shape[0] == 2 * units
        own = sampler | {"head_granularity": "query_head"}
        assert paged_attention([QUEST, own], shape_of())[0].maskers[1].needs_query_heads


@pytest.mark.parametrize("granularity", ["query_head", "kv_head"])
@pytest.mark.parametrize("other", [QUEST, ORACLE], ids=["KV heads", "query heads"])
def test_loaded_bytes_count_what_the_sampler_reads_to_sample(granularity: str, other: dict) -> None:
    """Rows of keys: those that its budget is measured on, selected ones and the base sample."""
    sampler = ADAPTIVE | {"head_granularity": granularity, "init_offset": 0, "local_offset": 0}
    attention, layout = paged_attention([*SINK_LOCAL, other, sampler], shape_of(head_size=16))
    rows = make_rows(layout, LENGTHS)
    rows.query /= 16
    _, read = attend(attention, rows)
    weights = selected_by_heads(attention, rows).reshape(len(LENGTHS), 2, 4, -1)
    before, _ = paged_attention([*SINK_LOCAL, other], shape_of(head_size=16))
    held = selected_by_heads(before, rows).reshape(len(LENGTHS), 2, 4, -1) > 0
    key_bytes = 16 * 4
    for row, length in enumerate(LENGTHS):
        loaded = int((weights[row] > 0).any(axis=1).sum()) * 2 * key_bytes
        scored = int(held[row].any(axis=1).sum())
        drawing = held[row].any(axis=1)
        if granularity == "query_head":
            drawing = held[row].reshape(8, -1)
        for unit in drawing:
            rest = length - int(unit.sum())
            scored += min(rest, max(2, int(rest * 0.05)))
        per_block = sum(index.bytes_per_block(attention.shape) for index in layout.indices)
        scanned = length * 2 * per_block // attention.shape.block_size
        if other is ORACLE:
            scanned += length * 2 * key_bytes
        assert read.loaded_bytes[row] == loaded + scored * key_bytes + scanned


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_pooled_and_spread_flags(data: st.DataObject) -> None:
    group, kv_heads = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3))
    lengths = np.array(data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=3)), np.int32)
    random = np.random.default_rng(data.draw(st.integers(0, 1000)))
    flags = (random.random((len(lengths) * kv_heads * group, 40)) < 0.3).astype(np.uint8)
    pooled = np.zeros((len(lengths) * kv_heads, 40), np.uint8)
    pool_flags(flags, lengths, pooled)
    visible = np.arange(40) < lengths.repeat(kv_heads)[:, None]
    expected = flags.reshape(len(pooled), group, 40).max(axis=1)
    assert (pooled == expected)[visible].all()
    sample = visible & (pooled == 0) & (random.random(pooled.shape) < 0.3)
    pooled[sample] = 2
    before = flags.copy()
    spread_flags(pooled, lengths, flags)
    visible = visible.repeat(group, axis=0)
    assert (flags == pooled.repeat(group, axis=0))[visible].all()
    assert (flags == before)[~visible].all()


@settings(deadline=None, max_examples=60)
@given(
    flags=st.lists(
        st.lists(st.sampled_from([0, 0, 0, 1, 2]), min_size=1, max_size=50), min_size=1, max_size=4
    ),
    probability=st.floats(0.001, 1.0),
    group=st.integers(2, 4),
)
def test_lists_of_kv_heads_have_one_weight_per_key(flags, probability, group) -> None:
    lengths = np.array([len(row) for row in flags], np.int32)
    table = np.zeros((len(flags), 56), np.uint8)
    for row, values in enumerate(flags):
        table[row, : len(values)] = values
    given = np.full(len(flags), probability, np.float32)
    lists = TokenLists.of(table, given, lengths, group, 1, is_sampled=True)
    assert lists.log_weights.shape[2] == 1
    for row, values in enumerate(flags):
        chosen = [place for place, flag in enumerate(values) if flag]
        assert lists.tokens[row, : lists.counts[row]].tolist() == chosen
        expected = [-np.log(given[row]) if values[place] == 2 else 0.0 for place in chosen]
        assert lists.log_weights[row, : len(chosen), 0].tolist() == pytest.approx(expected)
        assert lists.keys_read[row] == group * len(chosen)
