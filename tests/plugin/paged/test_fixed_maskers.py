"""Sink, local, oracle top-k and Quest on pages: the same keys as the general path, exactly."""

from dataclasses import replace

import pytest
import torch

from tests.plugin.paged.paged_rows import (
    LENGTHS,
    SINK_LOCAL,
    Rows,
    attend,
    general,
    make_rows,
    paged_attention,
    shape_of,
)
from tests.tolerances import ATTENTION_ATOL
from vllm_sparse_plugin.paged import attention as paged_attention_module


def quest(heavy_size, page_size: int = 8, bits: int = 16, granularity: str = "query_head") -> dict:
    return {
        "type": "quest_top_k",
        "heavy_size": heavy_size,
        "page_size": page_size,
        "label_bits": bits,
        "head_granularity": granularity,
    }


def oracle(heavy_size, granularity: str = "query_head") -> dict:
    return {"type": "oracle_top_k", "heavy_size": heavy_size, "head_granularity": granularity}


CONFIGS = {
    "sink": [{"type": "sink", "sink_size": 5}],
    "local share": [{"type": "local", "window_size": 0.3}],
    "everything": [{"type": "sink", "sink_size": 1.0}],
    "sink-local": SINK_LOCAL,
    "oracle": [*SINK_LOCAL, oracle(20)],
    "oracle share": [*SINK_LOCAL, oracle(0.1)],
    "oracle alone, nothing for short rows": [oracle(0.02)],
    "oracle, group": [*SINK_LOCAL, oracle(0.1, "kv_head")],
    "oracle, larger than the rows": [oracle(64)],
    "oracle first, overlapping": [oracle(0.2), *SINK_LOCAL],
    "quest": [*SINK_LOCAL, quest(0.2)],
    "quest alone": [quest(48, 16)],
    "quest of all": [*SINK_LOCAL, quest(1.0)],
    "quest, group": [*SINK_LOCAL, quest(0.2, 16, 16, "kv_head")],
    "quest after a group's oracle": [oracle(0.1, "kv_head"), quest(0.2)],
    "group's oracle after quest": [quest(0.2), oracle(0.1, "kv_head")],
}


@pytest.mark.parametrize("name", CONFIGS)
def test_same_keys_and_output_as_the_general_path(name: str) -> None:
    attention, layout = paged_attention(CONFIGS[name], shape_of())
    for spare_keys in (0, 5):
        rows = make_rows(layout, spare_keys=spare_keys)
        output, read = attend(attention, rows)
        expected, counts = general(CONFIGS[name], rows)
        assert read.keys.tolist() == counts
        assert (output - expected).abs().max() <= ATTENTION_ATOL[torch.float32]


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (3, 3), (9, 3), (8, 1)])
@pytest.mark.parametrize(("head_size", "block_size"), [(64, 32), (80, 128)])
def test_heads_and_sizes(heads: int, kv_heads: int, head_size: int, block_size: int) -> None:
    maskers = [*SINK_LOCAL, quest(0.15, 16, 16, "kv_head"), oracle(0.05)]
    attention, layout = paged_attention(maskers, shape_of(heads, kv_heads, head_size, block_size))
    rows = make_rows(layout)
    output, read = attend(attention, rows)
    expected, counts = general(maskers, rows)
    assert read.keys.tolist() == counts
    assert (output - expected).abs().max() <= ATTENTION_ATOL[torch.float32]


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
@pytest.mark.parametrize("page_size", [8, 32])
@pytest.mark.parametrize("granularity", ["query_head", "kv_head"])
def test_quantised_bounds(bits: int, page_size: int, granularity: str) -> None:
    """Random keys: scores differ in their last bits, so a near tie may fall either way."""
    maskers = [*SINK_LOCAL, quest(0.2, page_size, bits, granularity)]
    attention, layout = paged_attention(maskers, shape_of())
    same = 0
    for seed in range(4):
        rows = make_rows(layout, seed=seed, exact=False)
        output, read = attend(attention, rows)
        expected, counts = general(maskers, rows)
        close = (output - expected).abs().amax(dim=(1, 2)) <= ATTENTION_ATOL[torch.float32]
        same += int((close & (torch.from_numpy(read.keys) == torch.tensor(counts))).sum())
    assert same >= 4 * len(LENGTHS) - 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [8, 16])
def test_half_precision(dtype: torch.dtype, bits: int) -> None:
    maskers = [*SINK_LOCAL, quest(0.2, 16, bits), oracle(0.05, "kv_head")]
    attention, layout = paged_attention(maskers, shape_of(dtype=dtype))
    rows = make_rows(layout)
    output, read = attend(attention, rows)
    expected, counts = general(maskers, rows)
    if bits == 16:  # the reference rounds decoded bounds to the keys' type, which can make ties
        assert read.keys.tolist() == counts
        assert (output - expected).abs().max() <= ATTENTION_ATOL[dtype]
    assert (output - expected).abs().mean() <= ATTENTION_ATOL[dtype]


def test_a_row_does_not_depend_on_its_neighbours_or_its_blocks(monkeypatch) -> None:
    maskers = [*SINK_LOCAL, quest(0.2), oracle(0.05)]
    attention, layout = paged_attention(maskers, shape_of())
    lengths = (*LENGTHS, 2000)  # the last one in several parts, whoever is beside it
    rows = make_rows(layout, lengths, exact=False)
    output, read = attend(attention, rows)
    alone = [attend(attention, _only(rows, row)) for row in range(len(lengths))]
    assert torch.equal(output, torch.cat([result for result, _ in alone]))
    assert read.keys.tolist() == [int(counts.keys[0]) for _, counts in alone]
    # In slices, as for more queries than may be planned at once.
    monkeypatch.setattr(paged_attention_module, "MAX_ENTRIES", 2000 * 8 * 2)
    sliced, _ = attend(attention, rows)
    assert torch.equal(output, sliced)


def _only(rows: Rows, row: int) -> Rows:
    batch = replace(
        rows.batch, rows=rows.batch.rows[row : row + 1], lengths=rows.batch.lengths[row : row + 1]
    )
    return replace(rows, query=rows.query[row : row + 1], batch=batch)


def test_loaded_bytes_are_what_the_heads_of_a_group_need_together() -> None:
    attention, layout = paged_attention([*SINK_LOCAL, oracle(0.1)], shape_of())
    rows = make_rows(layout)
    _, read = attend(attention, rows)
    flags = attention._select(rows.query.numpy(), rows.cache, rows.batch, 32**-0.5).flags
    for row, length in enumerate(LENGTHS):
        selected = flags.reshape(len(LENGTHS), 2, 4, -1)[row, :, :, :length] > 0
        loaded = int(selected.any(axis=1).sum())
        scanned = length * 2 * 32 * 4  # the oracle reads every key
        assert read.loaded_bytes[row] == loaded * 2 * 32 * 4 + scanned
        assert read.keys[row] == selected.sum()
