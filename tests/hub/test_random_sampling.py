"""Random sampling: the generator, the sample, and the estimate that is made of it."""

import math

import pytest
import torch

from sparse_attention_hub.sparse_attention import (
    LocalMaskerConfig,
    Mask,
    RandomSamplingMaskerConfig,
    ResearchAttention,
    ResearchAttentionConfig,
    SinkMaskerConfig,
)
from sparse_attention_hub.sparse_attention.research_attention.maskers.sampling.counter_random import (  # noqa: E501
    uniform_per_key,
)
from sparse_attention_hub.sparse_attention.utils.mask_attention_utils import (
    get_attention_denominator,
    get_attention_numerator,
    get_masked_attention_output,
    get_true_attention_output,
)
from tests.hub.brute_force import additive, causal
from tests.tolerances import ATTENTION_ATOL

SINK_LOCAL = [SinkMaskerConfig(2), LocalMaskerConfig(3)]


def tensors(batch: int, heads: int, kv_heads: int, queries: int, keys: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(batch, heads, queries, 8, generator=generator),
        torch.randn(batch, kv_heads, keys, 8, generator=generator),
        torch.randn(batch, kv_heads, keys, 8, generator=generator),
    )


def select(maskers, query, key, mask, layer: int = 0) -> torch.Tensor:
    attention = ResearchAttention.create_from_config(ResearchAttentionConfig(maskers))
    return attention.select(query, key, key, mask, 0.3, 0.0, {}, layer_idx=layer).get_dense_mask()


def uniform(seed: int, layer: int, heads: int, position: int, keys: int) -> torch.Tensor:
    return uniform_per_key(seed, layer, heads, torch.tensor(position).view(1, 1, 1, 1), keys)[
        0, :, 0
    ]


def splitmix(*words: int) -> float:
    """The generator in Python's own integers."""
    full = (1 << 64) - 1
    state = words[0]
    for following in (*words[1:], None):
        state = (state + 0x9E3779B97F4A7C15) & full
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & full
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & full
        state ^= state >> 31
        if following is not None:
            state ^= following
    return (state >> 11) * 2.0**-53


@pytest.mark.parametrize("seed", [0, 42, 2**63 - 1])
def test_generator_is_its_definition(seed: int) -> None:
    found = uniform(seed, 5, 3, 1000, 40)
    for head in range(3):
        for key in range(40):
            assert found[head, key] == splitmix(seed, 5, head, 1000, key)


def test_numbers_are_uniform_and_differ_by_every_part_of_the_counter() -> None:
    base = uniform(1, 2, 4, 3, 50_000)
    others = [uniform(9, 2, 4, 3, 50_000), uniform(1, 9, 4, 3, 50_000), uniform(1, 2, 4, 9, 50_000)]
    for other in (*others, base.roll(1, 0), base.roll(1, 1)):
        # Correlation of 200,000 independent pairs: standard deviation 1 / sqrt(200,000).
        pair = torch.stack([base.flatten(), other.flatten()])
        assert abs(torch.corrcoef(pair)[0, 1]) < 5 / math.sqrt(200_000)
    counts = torch.histc(base, 100, 0, 1)
    # Chi-square of 99 degrees of freedom: mean 99, standard deviation 14.
    assert ((counts - 2000) ** 2 / 2000).sum() < 99 + 5 * 14
    assert base.min() >= 0
    assert base.max() < 1


@pytest.mark.parametrize("rate", [0.001, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1), (1, 8, 1, 1, 65), (2, 6, 2, 5, 37)])
def test_a_sample_is_of_the_rest_and_has_its_probability(shape, rate: float) -> None:
    batch, heads, _, queries, keys = shape
    query, key, _ = tensors(*shape)
    visible = causal(batch, queries, keys, padding=1)
    mask = additive(visible)
    fixed = (select(SINK_LOCAL, query, key, mask) > 0) & visible[:, None]
    found = select([*SINK_LOCAL, RandomSamplingMaskerConfig(rate)], query, key, mask)
    found = found * visible[:, None]
    assert (found[fixed] == 1).all()
    for row_visible, row_fixed, row in zip(
        visible[:, None].expand(batch, heads, queries, keys).flatten(0, 2),
        fixed.flatten(0, 2),
        found.flatten(0, 2),
        strict=True,
    ):
        rest = int((row_visible & ~row_fixed).sum())
        sampled = row[row_visible & ~row_fixed]
        wanted = min(rest, max(1, int(rest * rate)))
        assert int((sampled > 0).sum()) == wanted
        # float32 holds the quotient to 24 bits.
        assert sampled[sampled > 0].tolist() == pytest.approx(
            [wanted / rest] * wanted if rest else []
        )


def test_a_row_alone_in_any_chunk_and_batch_has_the_same_sample() -> None:
    query, key, _ = tensors(1, 4, 2, 7, 45)
    maskers = [SinkMaskerConfig(2), RandomSamplingMaskerConfig(0.4)]
    together = select(maskers, query, key, additive(causal(1, 7, 45)), layer=3)
    for row in range(7):
        last = 45 - 7 + row + 1
        part = query[:, :, row : row + 1], key[:, :, :last]
        alone = select(maskers, *part, None, layer=3)
        assert torch.equal(together[:, :, row, :last], alone[:, :, 0])
        batch = select(maskers, *(tensor.repeat(3, 1, 1, 1) for tensor in part), None, layer=3)
        assert torch.equal(batch, alone.repeat(3, 1, 1, 1))


def test_layers_heads_positions_and_seeds_have_samples_of_their_own() -> None:
    query, key, _ = tensors(1, 4, 4, 2, 200)
    mask = additive(causal(1, 2, 200))
    one = select([RandomSamplingMaskerConfig(0.5)], query, key, mask, layer=0)
    assert not torch.equal(one[:, 0], one[:, 1])
    assert not torch.equal(one[:, :, 0, :199], one[:, :, 1, :199])
    other_layer = select([RandomSamplingMaskerConfig(0.5)], query, key, mask, layer=1)
    other_seed = select([RandomSamplingMaskerConfig(0.5, seed=7)], query, key, mask, layer=0)
    assert not torch.equal(one, other_layer)
    assert not torch.equal(one, other_seed)
    assert torch.equal(one, select([RandomSamplingMaskerConfig(0.5)], query, key, mask, layer=0))


def test_every_key_has_the_stated_chance() -> None:
    """Over 2,000 seeds: a count of key i is binomial(2000, 0.25)."""
    query, key, _ = tensors(1, 1, 1, 1, 40)
    counts = sum(
        (select([RandomSamplingMaskerConfig(0.25, seed=seed)], query, key, None) > 0).double()
        for seed in range(2000)
    )
    deviation = math.sqrt(2000 * 0.25 * 0.75)
    assert ((counts - 500).abs() < 5 * deviation).all()


@pytest.mark.parametrize("rate", [0.1, 0.5, 1.0])
def test_numerator_and_denominator_are_unbiased(rate: float) -> None:
    """Means over 1,000 seeds within 5 standard errors; drawing with replacement fails this.

    A sink, always selected, is made every row's maximum: then the row constant is the same with any
    sample, and numerators and denominators can be averaged.
    """
    query, key, value = tensors(1, 4, 4, 1, 60)
    scores = query @ key.mT
    # Above every score divided by its probability; 0.3 is the scaling.
    wanted = scores.amax(dim=-1, keepdim=True) + 0.1 - math.log(rate) / 0.3
    sink = query * wanted / (query * query).sum(dim=-1, keepdim=True)
    key, value = torch.cat([sink, key], dim=2), torch.cat([value[:, :, :1], value], dim=2)
    arguments = (None, query, key, None, 0.3, 0.0)
    shape = (1, 4, 1, 61)
    full = Mask.create_full_mask(shape, torch.float32, query.device)
    denominators, numerators = [], []
    for seed in range(1000):
        weights = select(
            [SinkMaskerConfig(1), RandomSamplingMaskerConfig(rate, seed=seed)], query, key, None
        )
        mask = Mask.create_mask_from_dense_mask(shape, weights, torch.float32)
        denominators.append(get_attention_denominator(*arguments, mask).double())
        numerators.append(
            get_attention_numerator(None, query, key, value, None, 0.3, 0.0, mask).double()
        )
    for estimates, truth in (
        (torch.stack(denominators), get_attention_denominator(*arguments, full)),
        (
            torch.stack(numerators),
            get_attention_numerator(None, query, key, value, None, 0.3, 0.0, full),
        ),
    ):
        error = estimates.std(0) / math.sqrt(len(estimates))
        assert ((estimates.mean(0) - truth).abs() <= 5 * error + 1e-6 * truth.abs()).all()


def test_a_rate_of_one_is_dense_attention() -> None:
    query, key, value = tensors(2, 6, 2, 5, 37)
    mask = additive(causal(2, 5, 37, padding=2))
    weights = select([SinkMaskerConfig(1), RandomSamplingMaskerConfig(1.0)], query, key, mask)
    selected = Mask.create_mask_from_dense_mask(weights.shape, weights, torch.float32)
    found = get_masked_attention_output(None, query, key, value, mask, 0.3, 0.0, selected)
    dense, _ = get_true_attention_output(None, query, key, value, mask, 0.3, 0.0)
    assert (found - dense).abs().max() <= ATTENTION_ATOL[torch.float32]


@pytest.mark.parametrize("rate", [0, 0.0, -0.1, 1.5, float("nan"), True, "0.5", None])
def test_rates_that_mean_nothing(rate: object) -> None:
    with pytest.raises(ValueError, match=r"sampling_rate must be a number in \(0, 1\]"):
        RandomSamplingMaskerConfig(rate)


@pytest.mark.parametrize("seed", [-1, 1 << 63, 1.0, None, True])
def test_seeds_that_mean_nothing(seed: object) -> None:
    with pytest.raises(ValueError, match="seed must be an integer in"):
        RandomSamplingMaskerConfig(0.5, seed=seed)


def test_one_sampling_masker_at_most() -> None:
    with pytest.raises(ValueError, match="at most one sampling masker"):
        ResearchAttentionConfig([RandomSamplingMaskerConfig(0.5), RandomSamplingMaskerConfig(0.1)])
