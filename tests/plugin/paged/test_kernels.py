"""Kernels against plain float64, and their parts against what numpy and Python do."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.plugin.paged.paged_rows import LENGTHS, make_rows, shape_of
from tests.tolerances import ATTENTION_ATOL
from vllm_sparse_plugin.paged.attention import attend_dense
from vllm_sparse_plugin.paged.kernels.exponential import exp_in_place
from vllm_sparse_plugin.paged.kernels.lists import clear_flags, list_tokens
from vllm_sparse_plugin.paged.kernels.selection import flag_largest
from vllm_sparse_plugin.paged.layout import BlockLayout


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "kv_heads", "head_size"), [(8, 2, 32), (3, 3, 64), (9, 3, 80)])
def test_dense_attention_against_float64(dtype, heads, kv_heads, head_size) -> None:
    rows = make_rows(
        BlockLayout(shape_of(heads, kv_heads, head_size, dtype=dtype)),
        lengths=(*LENGTHS, 2000),
        exact=False,
    )
    found = attend_dense(rows.query.float().numpy(), rows.cache, rows.batch, head_size**-0.5)
    for row, key in enumerate(rows.keys):
        key, value = (
            t[0].double().repeat_interleave(heads // kv_heads, 0) for t in (key, rows.values[row])
        )
        scores = torch.einsum("hd,hkd->hk", rows.query[row].double(), key) * head_size**-0.5
        expected = torch.einsum("hk,hkd->hd", scores.softmax(dim=-1), value)
        # Whatever the cache's type, sums are float32 and the result is not rounded again.
        difference = (torch.from_numpy(found[row]).double() - expected).abs().max()
        assert difference <= ATTENTION_ATOL[torch.float32]


@pytest.mark.parametrize("offset", [0.0, -300.0, 300.0, 1e30, -1e30, np.inf, -np.inf])
def test_learned_sinks(offset: float) -> None:
    """One more logit per query head, without a value, in rows of one part and of many."""
    rows = make_rows(
        BlockLayout(shape_of(6, 2, 32, dtype=torch.bfloat16)), lengths=(1, 40, 2000), exact=False
    )
    sinks = torch.linspace(-2, 4, 6) + offset
    found = attend_dense(
        rows.query.float().numpy(), rows.cache, rows.batch, 32**-0.5, sink_logits=sinks.numpy()
    )
    for row, length in enumerate(rows.batch.lengths.tolist()):
        key, value = (
            t[0, :, :length].double().repeat_interleave(3, 0)
            for t in (rows.keys[row], rows.values[row])
        )
        scores = torch.einsum("hd,hkd->hk", rows.query[row].double(), key) * 32**-0.5
        weights = torch.cat([scores, sinks[:, None].double()], dim=1).softmax(dim=-1)[:, :-1]
        if offset == np.inf:  # for which torch has no softmax
            weights = torch.zeros_like(weights)
        expected = torch.einsum("hk,hkd->hd", weights, value)
        difference = (torch.from_numpy(found[row]).double() - expected).abs().max()
        assert difference <= ATTENTION_ATOL[torch.float32]


def test_extreme_scores() -> None:
    """Scores far apart, all equal, and so low that plain powers would vanish."""
    layout = BlockLayout(shape_of(1, 1, 32))
    for factor in (0.0, 1e4, -1e4):
        rows = make_rows(layout, lengths=(100,), exact=False)
        query = np.full((1, 1, 32), factor, np.float32)
        found = attend_dense(query, rows.cache, rows.batch, 1.0)
        scores = rows.keys[0][0, 0].double() @ torch.from_numpy(query[0, 0]).double()
        expected = scores.softmax(dim=0) @ rows.values[0][0, 0].double()
        difference = (torch.from_numpy(found[0, 0]).double() - expected).abs().max()
        assert difference <= ATTENTION_ATOL[torch.float32]


def test_exponential() -> None:
    values = np.concatenate([np.linspace(-87, 0, 20001), -np.logspace(-30, 1, 500), [0.0]]).astype(
        np.float32
    )
    found = values.copy()
    exp_in_place(found, len(found), 1.0, 0.0)
    exact = np.exp(values.astype(np.float64))
    assert (np.abs(found - exact) / exact).max() < 2e-7
    low = np.array([-np.inf, -1e30, -100], np.float32)
    exp_in_place(low, 3, 1.0, 0.0)
    assert (low < 1e-37).all()


finite = st.floats(width=32, allow_nan=False)


@settings(deadline=None, max_examples=200)
@given(
    scores=st.lists(
        st.one_of(finite, st.sampled_from([0.0, -0.0, 1.0, math.inf, -math.inf])),
        min_size=1,
        max_size=60,
    ),
    selected=st.lists(st.booleans(), min_size=60, max_size=60),
    count=st.integers(1, 70),
)
def test_the_largest_of_a_row(scores, selected, count) -> None:
    """Ties, infinities, zeros of both signs, more wanted than there are: as sorting does it."""
    length = len(scores)
    flags = np.zeros((1, 64), np.uint8)
    flags[0, :length] = selected[:length]
    row = np.full((1, 1, 64), np.nan, np.float32)
    row[0, 0, :length] = scores
    lengths = np.array([length], np.int32)
    flag_largest(row, 1, 1, np.array([count]), 1.0, lengths, flags)
    allowed = [place for place in range(length) if not selected[place]]
    ranked = sorted(allowed, key=lambda place: (-np.float32(scores[place]), place))
    chosen = {place for place in range(length) if selected[place]} | set(ranked[:count])
    assert set(np.flatnonzero(flags[0]).tolist()) == chosen


@settings(deadline=None, max_examples=100)
@given(
    flags=st.lists(
        st.lists(st.sampled_from([0, 0, 0, 1, 2]), min_size=1, max_size=50), min_size=1, max_size=4
    ),
)
def test_lists_of_flagged_keys(flags) -> None:
    lengths = np.array([len(row) for row in flags], np.int32)
    table = np.full((len(flags), 56), 7, np.uint8)
    clear_flags(table, lengths)
    for row, values in enumerate(flags):
        assert not table[row, : (len(values) + 7) // 8 * 8].any()
        table[row, : len(values)] = values
    tokens = np.full(table.shape, -1, np.int32)
    counts = np.empty(len(flags), np.int32)
    list_tokens(table, lengths, tokens, counts)
    for row, values in enumerate(flags):
        chosen = [place for place, flag in enumerate(values) if flag]
        assert tokens[row, : counts[row]].tolist() == chosen
