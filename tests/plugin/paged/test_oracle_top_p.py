"""Oracle top-p on pages: the same keys as the general path."""

import pytest
import torch

from tests.plugin.paged.label_rows import assert_independent_rows
from tests.plugin.paged.paged_rows import (
    SINK_LOCAL,
    attend,
    general,
    make_rows,
    paged_attention,
    shape_of,
)
from tests.tolerances import ATTENTION_ATOL

PREVIOUS = {
    "sink-local": SINK_LOCAL,
    "first": [],
    "group's oracle": [{"type": "oracle_top_k", "heavy_size": 0.1, "head_granularity": "kv_head"}],
}


def assert_same(maskers: list[dict], **shape) -> None:
    attention, layout = paged_attention(maskers, shape_of(**shape))
    for spare_keys in (0, 5):
        rows = make_rows(layout, spare_keys=spare_keys)
        output, read = attend(attention, rows)
        expected, counts = general(maskers, rows)
        assert read.keys.tolist() == counts
        assert (output - expected).abs().max() <= ATTENTION_ATOL[layout.shape.dtype]


@pytest.mark.parametrize("top_p", [0.0, 0.3, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("previous", PREVIOUS)
def test_same_keys_and_output_as_the_general_path(top_p: float, previous: str) -> None:
    """Small integers: many keys are exactly as heavy as the last one that is needed."""
    assert_same([*PREVIOUS[previous], {"type": "oracle_top_p", "top_p": top_p}])


@pytest.mark.parametrize(("heads", "kv_heads", "block_size"), [(3, 3, 32), (9, 3, 128)])
def test_heads_and_blocks(heads: int, kv_heads: int, block_size: int) -> None:
    maskers = [*SINK_LOCAL, {"type": "oracle_top_p", "top_p": 0.7}]
    assert_same(maskers, heads=heads, kv_heads=kv_heads, block_size=block_size)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    assert_same([*SINK_LOCAL, {"type": "oracle_top_p", "top_p": 0.7}], dtype=dtype)


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    assert_independent_rows([*SINK_LOCAL, {"type": "oracle_top_p", "top_p": 0.7}])


def test_it_reads_every_key_and_says_so() -> None:
    attention, layout = paged_attention([{"type": "oracle_top_p", "top_p": 0.0}], shape_of())
    rows = make_rows(layout, lengths=(100,), exact=False)  # no ties
    _, read = attend(attention, rows)
    assert read.keys.tolist() == [8]  # the heaviest key of each head
    assert read.loaded_bytes[0] > 100 * 2 * 32 * 4
