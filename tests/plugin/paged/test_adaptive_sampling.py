"""Adaptive sampling on pages: the same base sample, budget and weights as the general path."""

import numpy as np
import pytest
import torch

from sparse_attention_hub.sparse_attention.serialization import config_from_dict, config_to_json
from tests.plugin.paged.paged_rows import (
    SINK_LOCAL,
    attend,
    general,
    make_rows,
    paged_attention,
    shape_of,
)
from tests.tolerances import ATTENTION_ATOL
from vllm_sparse_plugin.paged.maskers.base import Unsupported
from vllm_sparse_plugin.paged.served import paged_attention_of

LENGTHS = (1, 2, 3, 8, 31, 32, 33, 97, 300, 700)
QUEST = {"type": "quest_top_k", "heavy_size": 0.1, "page_size": 8, "head_granularity": "kv_head"}


def adaptive(base=0.05, epsilon=0.2, init=4, local=8, **fields) -> dict:
    return {
        "type": "adaptive_sampling",
        "base_rate_sampling": base,
        "epsilon": epsilon,
        "delta": 0.2,
        "init_offset": init,
        "local_offset": local,
        **fields,
    }


CONFIGS = {
    "alone": [adaptive()],
    "no offsets": [adaptive(init=0, local=0)],
    "offsets as shares": [adaptive(init=0.1, local=0.25)],
    "offsets over everything": [adaptive(init=0.9, local=0.9)],
    "base sample of whole rows": [adaptive(base=64)],
    "a base sample of one key, which is one of two": [*SINK_LOCAL, adaptive(base=1)],
    "few base keys, large budgets": [*SINK_LOCAL, adaptive(base=2, epsilon=0.02)],
    "small budgets": [*SINK_LOCAL, adaptive(base=0.1, epsilon=0.9)],
    "after the oracle": [*SINK_LOCAL, {"type": "oracle_top_k", "heavy_size": 0.1}, adaptive()],
    "after a group's Quest": [*SINK_LOCAL, QUEST, adaptive()],
    "everything is selected": [{"type": "sink", "sink_size": 1.0}, adaptive()],
    "before the oracle": [adaptive(), {"type": "oracle_top_k", "heavy_size": 9}],
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("layer", "spare_keys"), [(0, 0), (5, 3)])
def test_same_keys_and_output_as_the_general_path(name: str, layer: int, spare_keys: int) -> None:
    """With a head size of 16 scaled scores are exact; so are budgets, but for last bits of exp."""
    attention, layout = paged_attention(CONFIGS[name], shape_of(head_size=16))
    rows = make_rows(layout, LENGTHS, seed=layer, layer_index=layer, spare_keys=spare_keys)
    # Scores of a few units: otherwise single keys are everything and no budget lies in between.
    rows.query /= 16
    output, read = attend(attention, rows)
    expected, counts = general(CONFIGS[name], rows)
    assert read.keys.tolist() == counts
    assert (output - expected).abs().max() <= ATTENTION_ATOL[torch.float32]


@pytest.mark.parametrize("base", [0, 0.0])
def test_without_a_base_sample_the_general_path_serves(base) -> None:
    maskers = [*SINK_LOCAL, adaptive(base=base)]
    with pytest.raises(Unsupported, match="base_rate_sampling of 0"):
        paged_attention(maskers, shape_of(head_size=16))
    attention, layout = paged_attention(SINK_LOCAL, shape_of(head_size=16))
    config = config_to_json(config_from_dict({"maskers": maskers}))
    assert paged_attention_of(config, layout, layer_index=0) is None
    rows = make_rows(layout, LENGTHS)
    output, read = attend(attention, rows)
    expected, counts = general(maskers, rows)
    assert read.keys.tolist() == counts
    assert (output - expected).abs().max() <= ATTENTION_ATOL[torch.float32]


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (3, 3), (9, 3), (8, 1)])
@pytest.mark.parametrize("seed", [0, 2**63 - 1])
def test_groups_and_seeds(heads: int, kv_heads: int, seed: int) -> None:
    maskers = [*SINK_LOCAL, QUEST, adaptive(seed=seed)]
    attention, layout = paged_attention(maskers, shape_of(heads, kv_heads, 16))
    rows = make_rows(layout, LENGTHS, seed=1)
    rows.query /= 16
    output, read = attend(attention, rows)
    expected, counts = general(maskers, rows)
    assert read.keys.tolist() == counts
    assert (output - expected).abs().max() <= ATTENTION_ATOL[torch.float32]


def test_budgets_lie_between_base_sample_and_everything() -> None:
    """The cases above would say little if every budget were at one of its ends."""
    maskers = [*SINK_LOCAL, adaptive(base=2, epsilon=0.1)]
    attention, layout = paged_attention(maskers, shape_of(head_size=16))
    rows = make_rows(layout, LENGTHS)
    rows.query /= 16
    queries = attention._select(rows.query.numpy(), rows.cache, rows.batch, 0.25)
    last = queries.flags.reshape(len(LENGTHS), 8, -1)[-1, :, : LENGTHS[-1]]
    sampled, certain = (last == 2).sum(axis=1), (last == 1).sum(axis=1)
    assert len(np.unique(sampled)) > 4
    assert ((sampled > 2) & (sampled < LENGTHS[-1] - certain)).all()
    rest = LENGTHS[-1] - certain
    assert np.allclose(queries.probability.reshape(len(LENGTHS), 8)[-1], sampled / rest)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    maskers = [*SINK_LOCAL, adaptive(epsilon=0.1)]
    attention, layout = paged_attention(maskers, shape_of(head_size=16, dtype=dtype))
    rows = make_rows(layout, LENGTHS)
    rows.query /= 16
    output, read = attend(attention, rows)
    expected, counts = general(maskers, rows)
    assert read.keys.tolist() == counts
    # The reference keeps probabilities in the keys' type.
    assert (output - expected).abs().max() <= 2 * ATTENTION_ATOL[dtype]
