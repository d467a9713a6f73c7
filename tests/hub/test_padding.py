"""A sequence with padding in front samples what it samples without: alone or in a batch."""

import pytest
import torch

from sparse_attention_hub.sparse_attention import (
    AdaptiveSamplingMaskerConfig,
    MagicPigConfig,
    RandomSamplingMaskerConfig,
    ResearchAttention,
    ResearchAttentionConfig,
    SinkMaskerConfig,
)
from tests.hub.brute_force import additive, causal
from tests.hub.top_k_maskers import tensors

SAMPLERS = {
    "magic pig": MagicPigConfig(lsh_l=12, lsh_k=3),
    "random": RandomSamplingMaskerConfig(0.2),
    "adaptive": AdaptiveSamplingMaskerConfig(0.1, 0.3, 0.2, 2, 0.05),
    "random, per KV head": RandomSamplingMaskerConfig(0.2, head_granularity="kv_head"),
    "adaptive, per KV head": AdaptiveSamplingMaskerConfig(
        0.1, 0.3, 0.2, 2, 0.05, head_granularity="kv_head"
    ),
}


@pytest.mark.parametrize("mask_heads", [1, 4])
@pytest.mark.parametrize("queries", [1, 9])
@pytest.mark.parametrize("name", SAMPLERS)
def test_padding_in_front_changes_no_sample(name, queries, mask_heads) -> None:
    keys, padding = 68, 30
    config = ResearchAttentionConfig([SinkMaskerConfig(2), SAMPLERS[name]])
    attention = ResearchAttention.create_from_config(config)
    query, key, value = tensors(2, 4, 2, queries, keys)
    mask = additive(causal(2, queries, keys, padding)).expand(-1, mask_heads, -1, -1)
    found = attention.select(query, key, value, mask, 0.25, 0.0, {}, layer_idx=1).get_dense_mask()
    for sequence in range(2):
        for row in range(queries):
            place = slice(sequence * padding, keys - queries + row + 1)
            alone = attention.select(
                query[sequence, :, row : row + 1][None],
                key[sequence, :, place][None],
                value[sequence, :, place][None],
                None,
                0.25,
                0.0,
                {},
                layer_idx=1,
            ).get_dense_mask()
            of_batch = found[sequence, :, row, place]
            assert torch.equal(of_batch > 0, alone[0, :, 0] > 0)
            # MagicPIG's probabilities come of matrix products, which round by their size.
            torch.testing.assert_close(of_batch, alone[0, :, 0], atol=0, rtol=1e-4)
