"""Any list of maskers, on any shape: the union of its definitions, its attention, its density."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_attention_hub.sparse_attention import (
    LocalMaskerConfig,
    MagicPigConfig,
    OracleTopKConfig,
    RandomSamplingMaskerConfig,
    ResearchAttention,
    ResearchAttentionConfig,
    SinkMaskerConfig,
)
from sparse_attention_hub.sparse_attention.density import count_read_keys
from sparse_attention_hub.sparse_attention.research_attention.maskers.base import ResearchMasker
from sparse_attention_hub.sparse_attention.utils.mask_attention_utils import (
    get_true_attention_output,
)
from tests.hub.brute_force import additive, causal, integers, selections
from tests.tolerances import ATTENTION_ATOL

sizes = st.one_of(
    st.integers(1, 12),
    st.floats(0.0, 1.0, exclude_min=True).map(lambda size: round(size, 3) or 1.0),
)
maskers = st.builds(
    lambda kind, size: kind(size),
    st.sampled_from([SinkMaskerConfig, LocalMaskerConfig, OracleTopKConfig]),
    sizes,
)


@given(
    st.lists(maskers, min_size=1, max_size=5),
    st.sampled_from([(1, 1), (2, 1), (4, 2), (3, 3), (6, 2)]),
    st.integers(1, 2),
    st.integers(1, 5),
    st.integers(0, 11),
    st.integers(0, 100),
)
@settings(max_examples=200, deadline=None)
def test_composition(configs, heads, batch: int, queries: int, history: int, seed: int) -> None:
    keys = queries + history
    config = ResearchAttentionConfig(configs)
    query, key = integers(batch, *heads, queries, keys, seed)
    value = torch.randn(key.shape, generator=torch.Generator().manual_seed(seed))
    visible = causal(batch, queries, keys, padding=1)
    mask = additive(visible)
    expected = selections(config, query, key, visible)

    attention = ResearchAttention.create_from_config(config)
    found = attention.select(query, key, value, mask, 0.5, 0.0, {})
    assert torch.equal((found.get_dense_mask() > 0) & visible[:, None], expected)
    counts = (int(expected.sum()), int(visible.sum()) * heads[0])
    assert count_read_keys(found, mask) == counts

    output, weights = attention.custom_attention(None, query, key, value, mask, 0.5, 0.0, {})
    scores = query.double() @ key.repeat_interleave(heads[0] // heads[1], 1).double().mT * 0.5
    reference = torch.softmax(scores.masked_fill(~expected, -torch.inf), -1).nan_to_num(0.0)
    attended = reference @ value.repeat_interleave(heads[0] // heads[1], 1).double()
    atol = ATTENTION_ATOL[torch.float32]
    assert (output.transpose(1, 2).double() - attended).abs().max() <= atol
    assert (weights.double() - reference).abs().max() <= atol


def test_two_samples_of_the_same_keys_are_refused() -> None:
    """Also when they come as maskers, and the configuration could not check them."""
    maskers = [
        ResearchMasker.create_masker_from_config(config)
        for config in (SinkMaskerConfig(2), RandomSamplingMaskerConfig(0.1), MagicPigConfig(8, 2))
    ]
    config = ResearchAttentionConfig([])
    assert ResearchAttention(config, maskers[:2]).maskers == maskers[:2]
    with pytest.raises(ValueError, match="one sampling masker .* RandomSamplingMasker, MagicPig"):
        ResearchAttention(config, maskers)


def test_no_maskers_is_dense() -> None:
    query, key = integers(2, 4, 2, 3, 9)
    mask = additive(causal(2, 3, 9))
    attention = ResearchAttention.create_from_config(ResearchAttentionConfig([]))
    selected = attention.select(query, key, key, mask, 0.5, 0.0, {})
    assert selected.is_full_mask()
    assert count_read_keys(selected, mask) == (2 * 4 * (7 + 8 + 9),) * 2
    output, _ = attention.custom_attention(None, query, key, key, mask, 0.5, 0.0, {})
    dense, _ = get_true_attention_output(None, query, key, key, mask, 0.5, 0.0)
    assert torch.equal(output, dense)
