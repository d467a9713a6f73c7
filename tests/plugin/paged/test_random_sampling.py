"""Random sampling on pages: the same sample and weights as the general path."""

import pytest
import torch

from tests.plugin.paged.paged_rows import (
    SINK_LOCAL,
    attend,
    general,
    make_rows,
    paged_attention,
    shape_of,
)
from tests.tolerances import ATTENTION_ATOL

LENGTHS = (1, 2, 3, 8, 31, 32, 33, 97, 300)
QUEST = {"type": "quest_top_k", "heavy_size": 0.1, "page_size": 8, "head_granularity": "kv_head"}


def sampling(rate: float, seed: int = 42) -> dict:
    return {"type": "random_sampling", "sampling_rate": rate, "seed": seed}


CONFIGS = {
    "alone": [sampling(0.1)],
    "alone, everything": [sampling(1.0)],
    "sink-local": [*SINK_LOCAL, sampling(0.2)],
    "sink-local, everything": [*SINK_LOCAL, sampling(1.0)],
    "after the oracle": [*SINK_LOCAL, {"type": "oracle_top_k", "heavy_size": 9}, sampling(0.05)],
    "after a group's Quest": [*SINK_LOCAL, QUEST, sampling(0.1)],
    # What a certain choice takes over from a sample is certain.
    "before the oracle": [sampling(0.3), {"type": "oracle_top_k", "heavy_size": 9}],
    "before local": [sampling(0.3), *SINK_LOCAL],
    "before a group's Quest": [sampling(0.3), QUEST],
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("layer", "spare_keys"), [(0, 0), (5, 3)])
def test_same_keys_and_output_as_the_general_path(name: str, layer: int, spare_keys: int) -> None:
    attention, layout = paged_attention(CONFIGS[name], shape_of())
    rows = make_rows(layout, LENGTHS, seed=layer, layer_index=layer, spare_keys=spare_keys)
    output, read = attend(attention, rows)
    expected, counts = general(CONFIGS[name], rows)
    assert read.keys.tolist() == counts
    assert (output - expected).abs().max() <= ATTENTION_ATOL[torch.float32]


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (3, 3), (9, 3), (8, 1)])
@pytest.mark.parametrize("seed", [0, 2**63 - 1])
def test_groups_and_seeds(heads: int, kv_heads: int, seed: int) -> None:
    maskers = [*SINK_LOCAL, sampling(0.25, seed)]
    attention, layout = paged_attention(maskers, shape_of(heads, kv_heads))
    rows = make_rows(layout, LENGTHS)
    output, read = attend(attention, rows)
    expected, counts = general(maskers, rows)
    assert read.keys.tolist() == counts
    assert (output - expected).abs().max() <= ATTENTION_ATOL[torch.float32]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    maskers = [*SINK_LOCAL, sampling(0.25)]
    attention, layout = paged_attention(maskers, shape_of(dtype=dtype))
    rows = make_rows(layout, LENGTHS)
    output, read = attend(attention, rows)
    expected, counts = general(maskers, rows)
    assert read.keys.tolist() == counts
    # The reference keeps probabilities in the keys' type.
    assert (output - expected).abs().max() <= 2 * ATTENTION_ATOL[dtype]
