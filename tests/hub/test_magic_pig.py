"""MagicPig: the collision probability of its paper, and estimates without bias."""

import math

import pytest
import torch

from sparse_attention_hub.sparse_attention import (
    MagicPig,
    MagicPigConfig,
    ResearchAttention,
    ResearchAttentionConfig,
    SinkMaskerConfig,
)
from tests.hub.brute_force import additive, causal
from tests.hub.top_k_maskers import tensors


def test_a_masker_says_what_its_configuration_says() -> None:
    masker = MagicPig.create_from_config(MagicPigConfig(8, 2, center=False, packing="float32"))
    assert (masker.lsh_l, masker.lsh_k, masker.center) == (8, 2, False)
    assert (masker.packing, masker.seed) == ("float32", 42)


def weights(config, query, key, value, mask=None, cache=None, before=()) -> torch.Tensor:
    attention = ResearchAttention.create_from_config(ResearchAttentionConfig([*before, config]))
    cache = {} if cache is None else cache
    return attention.select(query, key, value, mask, 0.25, 0.0, cache, layer_idx=1).get_dense_mask()


def test_probability_is_that_of_two_collisions_and_is_met() -> None:
    """Frequency of selection over seeds; 4 binomial standard deviations per key."""
    query, key, value = tensors(1, 2, 1, 1, 40)
    seeds, tables, bits = 600, 8, 2
    counts = torch.zeros(1, 2, 1, 40)
    stated = torch.zeros(1, 2, 1, 40)
    for seed in range(seeds):
        found = weights(MagicPigConfig(tables, bits, seed=seed), query, key, value)
        counts += found > 0
        stated = torch.maximum(stated, found)
    centred = key - key[:, :, :32].mean(dim=2, keepdim=True)
    cosine = torch.cosine_similarity(query.unsqueeze(3), centred.unsqueeze(2), dim=-1).double()
    hit = (1 - cosine.acos() / math.pi) ** bits
    expected = 1 - (1 - hit) ** tables - tables * hit * (1 - hit) ** (tables - 1)
    torch.testing.assert_close(stated.double(), expected, atol=1e-5, rtol=1e-4)
    deviation = (expected * (1 - expected) / seeds).sqrt()
    assert ((counts / seeds - expected).abs() <= 4 * deviation + 1e-9).all()


@pytest.mark.parametrize("center", [True, False])
def test_numerator_and_denominator_are_unbiased(center) -> None:
    """Means over seeds against exact sums; 4 standard errors."""
    query, key, value = tensors(1, 4, 2, 1, 60, seed=5)
    mass = torch.exp((query @ key.repeat_interleave(2, 1).transpose(2, 3)) * 0.25).double()
    values = value.repeat_interleave(2, 1).double()
    estimates = []
    for seed in range(800):
        config = MagicPigConfig(10, 2, center=center, seed=seed)
        found = weights(config, query, key, value, before=[SinkMaskerConfig(2)]).double()
        scaled = torch.where(found > 0, mass / found.clamp(min=1e-30), 0.0)
        estimates.append(torch.cat([scaled.sum(-1, keepdim=True), scaled @ values], dim=-1))
    drawn = torch.stack(estimates)
    exact = torch.cat([mass.sum(-1, keepdim=True), mass @ values], dim=-1)
    error = drawn.std(dim=0) / math.sqrt(len(estimates))
    assert ((drawn.mean(dim=0) - exact).abs() <= 4 * error).all()


def test_a_row_alone_samples_what_it_samples_in_company() -> None:
    query, key, value = tensors(2, 4, 2, 9, 68)
    config = MagicPigConfig(10, 2)
    found = weights(config, query, key, value, additive(causal(2, 9, 68, 30)))
    for row in range(9):
        last = 60 + row
        for b in range(2):
            part = slice(b * 30, last)
            alone = weights(
                config,
                query[b : b + 1, :, row : row + 1],
                key[b : b + 1, :, part],
                value[b : b + 1, :, part],
            )
            torch.testing.assert_close(found[b, :, row, part], alone[0, :, 0], atol=1e-6, rtol=1e-4)


def test_signatures_kept_between_steps_are_those_made_anew() -> None:
    """Several keys at once on a cached prefix raise in the field's API."""
    query, key, value = tensors(1, 4, 2, 80, 80)
    cache: dict = {}
    for last in (20, 21, 25, 63, 64, 80, 30):
        arguments = (query[:, :, last - 1 : last], key[:, :, :last], value[:, :, :last])
        kept = weights(MagicPigConfig(10, 2), *arguments, cache=cache)
        assert torch.equal(kept, weights(MagicPigConfig(10, 2), *arguments))


def test_one_key_gives_no_nan() -> None:
    query, key, value = tensors(1, 2, 1, 1, 1)
    for seed in range(20):
        found = weights(MagicPigConfig(4, 1, seed=seed), query, key, value)
        assert found.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype) -> None:
    query, key, value = (part.to(dtype) for part in tensors(1, 4, 2, 1, 50))
    attention = ResearchAttention.create_from_config(
        ResearchAttentionConfig([SinkMaskerConfig(2), MagicPigConfig(10, 2)])
    )
    output, _ = attention.custom_attention(
        None, query, key, value, None, 0.25, 0.0, {}, layer_idx=0
    )
    assert output.dtype == dtype
    assert output.isfinite().all()


def test_packings_are_the_same() -> None:
    query, key, value = tensors(1, 2, 1, 1, 50)
    found = [
        weights(MagicPigConfig(6, 3, packing=name), query, key, value)
        for name in ("int64", "float32")
    ]
    assert torch.equal(*found)
