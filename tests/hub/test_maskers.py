"""Each masker against its definition."""

import pytest
import torch

from sparse_attention_hub.sparse_attention import (
    LocalMaskerConfig,
    Mask,
    OracleTopKConfig,
    ResearchAttention,
    ResearchAttentionConfig,
    SinkMaskerConfig,
)
from sparse_attention_hub.sparse_attention.research_attention.maskers.fixed import (
    FixedMaskerConfig,
)
from tests.hub.brute_force import additive, causal, integers, selections

SIZES = [1, 2, 5, 1000, 0.01, 0.3, 0.5, 1.0]
MASKERS = {"sink": SinkMaskerConfig, "local": LocalMaskerConfig, "oracle": OracleTopKConfig}
SHAPES = [(1, 1, 1, 1, 1), (1, 4, 2, 1, 9), (2, 3, 3, 4, 4), (3, 6, 2, 5, 13)]


def select(config, query, key, mask, previous: Mask | None = None, **kwargs) -> Mask:
    attention = ResearchAttention.create_from_config(ResearchAttentionConfig([config]))
    if previous is None:
        return attention.select(query, key, key, mask, 1.0, 0.0, {}, **kwargs)
    return attention.maskers[0].add_mask(
        keys=key,
        queries=query,
        values=key,
        attention_mask=mask,
        scaling=1.0,
        dropout=0.0,
        sparse_meta_data={},
        previous_mask=previous,
    )


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", MASKERS)
def test_selection_is_its_definition(name: str, shape, size) -> None:
    batch, _, _, queries, keys = shape
    config = MASKERS[name](size)
    query, key = integers(*shape)
    visible = causal(batch, queries, keys, padding=1)
    expected = selections(ResearchAttentionConfig([config]), query, key, visible)
    for mask in (additive(visible), visible[:, None]):
        found = select(config, query, key, mask).get_dense_mask() > 0
        assert torch.equal(found & visible[:, None], expected)
    if queries == 1:
        everything = torch.ones(batch, queries, keys, dtype=torch.bool)
        expected = selections(ResearchAttentionConfig([config]), query, key, everything)
        assert torch.equal(select(config, query, key, None).get_dense_mask() > 0, expected)


@pytest.mark.parametrize("name", ["sink", "local", "oracle"])
def test_invisible_keys_are_never_selected(name: str) -> None:
    query, key = integers(2, 4, 2, 5, 8)
    visible = causal(2, 5, 8, padding=3)
    found = select(MASKERS[name](3), query, key, additive(visible)).get_dense_mask() > 0
    assert not (found & ~visible[:, None]).any()
    assert found.any()


@pytest.mark.parametrize("size", [2, 0.4])
@pytest.mark.parametrize("name", MASKERS)
def test_a_row_alone_selects_what_it_selects_in_company(name: str, size) -> None:
    """The rule that makes chunked prefill right: other queries in the call do not matter."""
    query, key = integers(1, 4, 2, 7, 15)
    visible = causal(1, 7, 15)
    together = select(MASKERS[name](size), query, key, additive(visible)).get_dense_mask()
    for row in range(7):
        last = 15 - 7 + row + 1
        alone = select(MASKERS[name](size), query[:, :, row : row + 1], key[:, :, :last], None)
        assert torch.equal(together[:, :, row, :last], alone.get_dense_mask()[:, :, 0])


@pytest.mark.parametrize("name", MASKERS)
def test_earlier_selections_stay_and_nothing_of_the_caller_changes(name: str) -> None:
    query, key = integers(1, 2, 1, 3, 9)
    visible = causal(1, 3, 9)
    mask = additive(visible)
    weights = torch.zeros(1, 2, 3, 9)
    weights[..., 4] = 0.25
    weights[0, 1, 2, 0] = 1.0
    previous = Mask.create_mask_from_dense_mask((1, 2, 3, 9), weights, torch.float32)
    before = mask.clone()
    found = select(MASKERS[name](2), query, key, mask, previous).get_dense_mask()
    assert torch.equal(previous.get_dense_mask(), weights)
    assert torch.equal(mask, before)
    assert (found >= weights).all()
    assert set(found.unique().tolist()) <= {0.0, 0.25, 1.0}


def test_oracle_adds_keys_beyond_those_selected() -> None:
    query, key = torch.ones(1, 1, 1, 1), torch.tensor([5.0, 4, 3, 2, 1, 0]).view(1, 1, 6, 1)
    weights = torch.tensor([1.0, 0, 0.5, 0, 0, 0]).view(1, 1, 1, 6)
    previous = Mask.create_mask_from_dense_mask((1, 1, 1, 6), weights, torch.float32)
    found = select(OracleTopKConfig(2), query, key, None, previous).get_dense_mask()
    assert found.flatten().tolist() == [1.0, 1.0, 0.5, 1.0, 0.0, 0.0]


def test_oracle_ties_go_to_the_lower_position() -> None:
    query, key = torch.ones(1, 1, 1, 1), torch.tensor([0.0, 7, 7, 7, 7, 9]).view(1, 1, 6, 1)
    found = select(OracleTopKConfig(3), query, key, None).get_dense_mask()
    assert found.flatten().tolist() == [0, 1, 1, 0, 0, 1]


def test_oracle_ranks_with_the_additive_bias() -> None:
    query, key = torch.ones(1, 1, 1, 1), torch.tensor([3.0, 2, 1]).view(1, 1, 3, 1)
    bias = torch.tensor([-10.0, 0, 0]).view(1, 1, 1, 3)
    found = select(OracleTopKConfig(1), query, key, bias).get_dense_mask()
    assert found.flatten().tolist() == [0, 1, 0]


def test_a_full_mask_stays_as_it_is() -> None:
    query, key = integers(1, 2, 1, 1, 5)
    full = Mask.create_full_mask((1, 2, 1, 5), torch.float32, query.device)
    for config in (*(masker(2) for masker in MASKERS.values()), FixedMaskerConfig()):
        assert select(config, query, key, None, full) is full


@pytest.mark.parametrize("name", MASKERS)
def test_a_size_that_covers_everything_is_full(name: str) -> None:
    query, key = integers(1, 2, 1, 1, 5)
    assert select(MASKERS[name](5), query, key, None).is_full_mask()


def test_causal_adds_nothing() -> None:
    query, key = integers(1, 2, 1, 1, 5)
    assert select(FixedMaskerConfig(), query, key, None).is_empty_mask()
    previous = Mask.create_empty_mask((1, 2, 1, 5), torch.float32, query.device)
    assert select(FixedMaskerConfig(), query, key, None, previous) is previous
