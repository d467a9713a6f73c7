"""Sorting a step's queries, and dense attention of many queries."""

import numpy as np
import pytest
import torch
from vllm.platforms import current_platform

from tests.plugin.paged.paged_rows import make_rows, shape_of
from tests.tolerances import ATTENTION_ATOL
from vllm_sparse_plugin.paged import prefill
from vllm_sparse_plugin.paged.layout import BlockLayout
from vllm_sparse_plugin.paged.page_bounds import PageBounds
from vllm_sparse_plugin.paged.step import MAX_DECODE_QUERIES, paged_step
from vllm_sparse_plugin.request_parameters import RequestParameters
from vllm_sparse_plugin.statistics import Statistics
from vllm_sparse_plugin.step_plan import DenseRow, SparseRow

current_platform.import_kernels()


def sparse_row(row: int, start: int, end: int, seq_len: int, config: str, tag=None) -> SparseRow:
    return SparseRow(row, start, end, seq_len, RequestParameters(config, "f", None, tag))


def test_queries_are_grouped_by_what_they_do() -> None:
    table = torch.arange(12, dtype=torch.int32).view(6, 2)
    dense = [DenseRow(0, 0, 1, 50), DenseRow(1, 1, 1 + 30, 40), DenseRow(4, 38, 40, 9)]
    sparse = [
        sparse_row(2, 31, 32, 60, "a"),
        sparse_row(3, 32, 35, 20, "b"),
        sparse_row(4, 40, 42, 11, "a"),
    ]
    step = paged_step(dense, sparse, table)
    assert step.prefills == (dense[1],)
    assert MAX_DECODE_QUERIES < 30
    assert step.decodes is not None
    assert step.decodes.tokens.tolist() == [0, 38, 39]
    assert step.decodes.batch.lengths.tolist() == [50, 8, 9]
    assert step.decodes.batch.rows.tolist() == [0, 4, 4]
    a, b = step.sparse
    assert (a.config_json, b.config_json) == ("a", "b")
    assert a.queries.tokens.tolist() == [31, 40, 41]
    assert a.queries.batch.lengths.tolist() == [60, 10, 11]
    assert b.queries.batch.lengths.tolist() == [18, 19, 20]
    assert paged_step([], [], table).decodes is None


def test_counts_reach_each_request() -> None:
    rows = [sparse_row(0, 0, 1, 60, "a", "x"), sparse_row(1, 1, 4, 20, "a", "y")]
    group = paged_step([], rows, torch.zeros(2, 1, dtype=torch.int32)).sparse[0]
    shape = shape_of()  # 8 heads, 2 KV heads, 256 bytes of key and value
    group.counts.add_dense(shape)
    group.counts.add_general(1, read=5, visible=8 * (18 + 19 + 20), shape=shape)
    statistics = Statistics(pending={1: [group.counts]})
    assert statistics.report("x")["visible_keys"] == 8 * 60
    y = statistics.report("y")
    assert y["read_keys"] == 8 * 57 + 5
    assert y["visible_keys"] == 2 * 8 * 57
    assert y["read_bytes"] == y["visible_bytes"] == 2 * 2 * 57 * 256
    assert (y["general_rows"], statistics.report("x")["general_rows"]) == (1, 0)
    assert statistics.report()["read_keys"] == 8 * 60 + 8 * 57 + 5
    assert statistics.report("x")["read_keys"] == 8 * 60  # settled once, not again


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scratch_bytes", [1 << 27, 1])
@pytest.mark.parametrize(("has_written", "has_sinks"), [(False, True), (True, False)])
def test_dense_prefill_against_float64(
    dtype, scratch_bytes, has_written, has_sinks, monkeypatch
) -> None:
    """Whole prompts and later chunks; all KV heads at once, and one at a time.

    With the step's own keys and values, which lie in one tensor with the queries as in vLLM, whole
    prompts do not read the cache: it is emptied for them.
    """
    monkeypatch.setattr(prefill, "MAX_SCRATCH_BYTES", scratch_bytes)
    shape = shape_of(6, 2, 64, 32, dtype)
    rows = make_rows(BlockLayout(shape, (PageBounds(16, 8),)), lengths=(40, 7, 200), exact=False)
    counts = [40, 5, 33]
    starts = np.concatenate([[0], np.cumsum(counts)])
    query = torch.randn(int(starts[-1]), 6, 64, generator=torch.Generator().manual_seed(1))
    query = query.to(dtype)
    output = torch.full((int(starts[-1]), 6 * 64), torch.nan, dtype=dtype)
    dense = [
        DenseRow(row, int(starts[row]), int(starts[row + 1]), length)
        for row, length in enumerate(rows.batch.lengths.tolist())
    ]
    written = None
    if has_written:
        rows.kv_cache[rows.batch.block_table[0, :2]] = torch.nan  # the whole prompt's blocks
        stacked = torch.full((int(starts[-1]), 10, 64), torch.nan, dtype=dtype)
        for row in dense:
            count = row.query_end - row.query_start
            part = slice(row.query_start, row.query_end)
            stacked[part, 6:8] = rows.keys[row.row][0, :, -count:].transpose(0, 1)
            stacked[part, 8:] = rows.values[row.row][0, :, -count:].transpose(0, 1)
        written = (stacked[:, 6:8], stacked[:, 8:])
    sinks = torch.linspace(-2, 4, 6).to(dtype) if has_sinks else None
    prefill.attend_prefills(
        dense,
        query,
        written,
        rows.cache,
        torch.from_numpy(rows.batch.block_table),
        64**-0.5,
        "vec",
        output,
        sinks,
    )
    for row in dense:
        key, value = (
            t[row.row][0].double().repeat_interleave(3, 0) for t in (rows.keys, rows.values)
        )
        part = query[row.query_start : row.query_end].double()
        scores = torch.einsum("qhd,hkd->hqk", part, key) * 64**-0.5
        position = torch.arange(row.seq_len)
        future = position[None] > position[row.seq_len - len(part) :, None]
        scores = scores.masked_fill(future, -torch.inf)
        if sinks is not None:  # one more logit, of a key without a value
            own = sinks.double()[:, None, None].expand(6, len(part), 1)
            scores = torch.cat([scores, own], dim=-1)
        weights = scores.softmax(dim=-1)[..., : row.seq_len]
        expected = torch.einsum("hqk,hkd->qhd", weights, value)
        found = output[row.query_start : row.query_end].view(-1, 6, 64).double()
        assert (found - expected).abs().max() <= ATTENTION_ATOL[dtype]
