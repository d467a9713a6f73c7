"""Adaptive sampling (vAttention): its estimate, its guarantee, and what it reads for it.

Error bars: a share of N independent rows is off by at most 4 binomial standard deviations; a mean
of estimates by at most 5 standard errors. Seeds are fixed.
"""

import math
from statistics import NormalDist

import pytest
import torch

from sparse_attention_hub.sparse_attention import (
    AdaptiveSamplingMaskerConfig,
    LocalMaskerConfig,
    Mask,
    OracleTopKConfig,
    ResearchAttention,
    ResearchAttentionConfig,
    SinkMaskerConfig,
)
from sparse_attention_hub.sparse_attention.research_attention.maskers.sampling import (
    AdaptiveSamplingMasker,
)
from sparse_attention_hub.sparse_attention.utils.mask_attention_utils import (
    get_attention_denominator,
    get_attention_numerator,
)
from tests.captured_attention import captured_layers
from tests.e2e.texts import prompt
from tests.hub.brute_force import additive, causal

FIELDS = {
    "base_rate_sampling": 0.05,
    "epsilon": 0.1,
    "delta": 0.1,
    "init_offset": 0,
    "local_offset": 0,
}
HEAVY = [OracleTopKConfig(0.05)]


def config(**changes) -> AdaptiveSamplingMaskerConfig:
    return AdaptiveSamplingMaskerConfig(**(FIELDS | changes))


def select(maskers, query, key, mask=None, scaling: float = 1.0, layer: int = 0) -> torch.Tensor:
    attention = ResearchAttention.create_from_config(ResearchAttentionConfig(maskers))
    found = attention.select(query, key, key, mask, scaling, 0.0, {}, layer_idx=layer)
    return found.get_dense_mask()


def from_scores(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A query and keys that have these scores; one head per row of `(N, K)`."""
    rows, keys = scores.shape
    return torch.ones(1, rows, 1, 1), scores.view(1, rows, keys, 1)


def relative_error(scores: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Of the estimated denominator; both `(N, K)`."""
    mass = (scores.double() - scores.amax(-1, keepdim=True)).exp()
    weights = weights.double()
    estimate = torch.where(weights > 0, mass / weights.masked_fill(weights == 0, 1), 0.0).sum(-1)
    return (estimate / mass.sum(-1) - 1).abs()


def needed(scores: torch.Tensor, selected: torch.Tensor, epsilon: float, delta: float):
    """Keys to sample for the guarantee, by one who knows the true deviation; `(N,)`."""
    mass = (scores.double() - scores.amax(-1, keepdim=True)).exp()
    rest = (~selected).sum(-1).double()
    mean = mass.masked_fill(selected, 0).sum(-1, keepdim=True) / rest[:, None]
    variance = ((mass - mean) ** 2).masked_fill(selected, 0).sum(-1) / (rest - 1)
    quantile = NormalDist().inv_cdf(1 - delta / 2)
    wanted = quantile**2 * variance * (rest / (epsilon * mass.sum(-1))) ** 2
    return wanted / (1 + wanted / rest)


def allowed_share(delta: float, rows: int) -> float:
    return delta + 4 * math.sqrt(delta * (1 - delta) / rows)


def synthetic(name: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(512, 3000, generator=generator)
    if name == "adversarial":
        scores = torch.zeros(512, 3000)
        scores[:, 1234] = 9.0  # one key holds nearly everything
        return scores
    return noise * {"flat": 0.01, "gaussian": 1.0, "heavy-tailed": 3.0}[name]


@pytest.mark.parametrize(("epsilon", "delta"), [(0.05, 0.1), (0.1, 0.2), (0.025, 0.2)])
@pytest.mark.parametrize("name", ["flat", "gaussian", "heavy-tailed", "adversarial"])
def test_error_stays_within_epsilon_as_often_as_promised(name, epsilon, delta) -> None:
    scores = synthetic(name)
    query, key = from_scores(scores)
    failures = 0
    for seed in range(4):
        sampling = config(base_rate_sampling=0.02, epsilon=epsilon, delta=delta, seed=seed)
        weights = select([*HEAVY, sampling], query, key)[0, :, 0]
        failures += int((relative_error(scores, weights) > epsilon).sum())
    assert failures / (4 * 512) <= allowed_share(delta, 4 * 512)


def test_reads_little_more_than_one_who_knows_the_deviation() -> None:
    """Within 1.5 times, base sample included, where accuracy and not the base sample decides."""
    scores = synthetic("gaussian")
    query, key = from_scores(scores)
    heavy = select(HEAVY, query, key)[0, :, 0] > 0
    for epsilon in (0.05, 0.025):
        sampling = config(base_rate_sampling=0.02, epsilon=epsilon)
        weights = select([*HEAVY, sampling], query, key)[0, :, 0]
        read = ((weights > 0) & ~heavy).sum(-1).double().mean()
        assert read <= 1.5 * needed(scores, heavy, epsilon, 0.1).mean()


def test_guarantee_on_real_attention(model_path: str) -> None:
    """Every layer and head of the small model, at several positions, as the paper composes it."""
    maskers = [SinkMaskerConfig(16), LocalMaskerConfig(32), OracleTopKConfig(0.05)]
    epsilon, delta, failures, rows = 0.05, 0.1, 0, 0
    calls = captured_layers(model_path, prompt(model_path, 100, 1500))
    for layer, call in enumerate(calls):
        for position in (700, 1100, 1499):
            part = call.query[:, :, position : position + 1], call.key[:, :, : position + 1]
            scores = (part[0] @ part[1].repeat_interleave(3, 1).mT)[0, :, 0] * call.scaling
            sampling = config(base_rate_sampling=0.05, epsilon=epsilon, delta=delta)
            weights = select([*maskers, sampling], *part, None, call.scaling, layer)[0, :, 0]
            failures += int((relative_error(scores, weights) > epsilon).sum())
            rows += len(scores)
    assert rows == 30 * 9 * 3
    assert failures / rows <= allowed_share(delta, rows)


def test_numerator_and_denominator_are_unbiased() -> None:
    """Over 1,000 seeds, with a sink that is every row's maximum whatever the sample."""
    generator = torch.Generator().manual_seed(5)
    query, key, value = (torch.randn(1, 4, n, 8, generator=generator) for n in (1, 120, 120))
    above = (query @ key.mT).amax(dim=-1, keepdim=True) + 0.1 + math.log(120) / 0.3
    sink = query * above / (query * query).sum(dim=-1, keepdim=True)
    key, value = torch.cat([sink, key], dim=2), torch.cat([value[:, :, :1], value], dim=2)
    # So small an epsilon that the sample's size is not at its bounds, since the sink is heavy.
    shape, epsilon = (1, 4, 1, 121), 0.002
    full = Mask.create_full_mask(shape, torch.float32, query.device)

    def estimate(mask: Mask) -> torch.Tensor:
        arguments = (None, query, key, None, 0.3, 0.0, mask)
        numerator = get_attention_numerator(*arguments[:3], value, *arguments[3:])
        return torch.cat([get_attention_denominator(*arguments), numerator], dim=-1).double()

    found, sizes = [], set()
    for seed in range(1000):
        maskers = [
            SinkMaskerConfig(1),
            config(base_rate_sampling=8, epsilon=epsilon, seed=seed),
        ]
        weights = select(maskers, query, key, None, 0.3)
        sizes.add(int((weights > 0).sum()))
        found.append(estimate(Mask.create_mask_from_dense_mask(shape, weights, torch.float32)))
    assert len(sizes) > 5
    assert min(sizes) < 4 * 121
    estimates = torch.stack(found)
    error = estimates.std(0) / math.sqrt(len(found))
    truth = estimate(full)
    assert ((estimates.mean(0) - truth).abs() <= 5 * error + 1e-6 * truth.abs()).all()


def test_no_key_is_sampled_that_was_selected_or_cannot_be_seen() -> None:
    generator = torch.Generator().manual_seed(2)
    query, key = (torch.randn(2, 4, n, 8, generator=generator) for n in (5, 90))
    visible = causal(2, 5, 90, padding=7)[:, None]
    mask = additive(visible[:, 0])
    before = select(HEAVY, query, key, mask)
    found = select([*HEAVY, config(init_offset=3, local_offset=0.1)], query, key, mask)
    assert (found[(before > 0) & visible] == 1).all()
    assert not (found * ~visible).any()
    rank = visible.cumsum(-1) - 1
    counts = visible.sum(-1, keepdim=True)
    outside = visible & ((rank < 3) | (rank >= counts - (counts.double() * 0.1).floor()))
    assert (found[outside.expand_as(found)] == 1).all()
    sampled = found[(found > 0) & (found < 1)]
    assert len(sampled) > 0


def test_a_row_alone_has_the_sample_it_has_in_company() -> None:
    generator = torch.Generator().manual_seed(3)
    query, key = (torch.randn(1, 4, n, 8, generator=generator) for n in (7, 145))
    maskers = [SinkMaskerConfig(2), config(base_rate_sampling=5, epsilon=0.3)]
    together = select(maskers, query, key, additive(causal(1, 7, 145)), 0.3, layer=3)
    for row in range(7):
        last = 145 - 7 + row + 1
        part = query[:, :, row : row + 1], key[:, :, :last]
        alone = select(maskers, *part, None, 0.3, layer=3)
        assert torch.equal(together[:, :, row, :last] > 0, alone[:, :, 0] > 0)
        # A sample's size follows from float sums, which may round otherwise in another shape.
        assert (together[:, :, row, :last] - alone[:, :, 0]).abs().max() < 1e-6


@pytest.mark.parametrize("keys", [1, 2, 3, 4])
def test_too_few_keys_to_sample_are_all_read(keys: int) -> None:
    query, key = torch.randn(1, 2, 1, 4), torch.randn(1, 2, keys, 4)
    assert (select([config(base_rate_sampling=2)], query, key) == 1).all()


def test_equal_keys_are_read_no_more_than_the_base_twice() -> None:
    query, key = torch.ones(1, 1, 1, 4), torch.ones(1, 1, 500, 4)
    weights = select([config(base_rate_sampling=10)], query, key)
    assert int((weights > 0).sum()) == 20
    assert weights.sum() == pytest.approx(10 + 10 * 10 / 490)


def test_a_base_sample_of_nothing_and_of_one() -> None:
    query, key = from_scores(torch.randn(3, 60, generator=torch.Generator().manual_seed(0)))
    before = select(HEAVY, query, key)
    for nothing in (0, 0.0):
        off = config(base_rate_sampling=nothing, init_offset=3)
        assert torch.equal(select([*HEAVY, off], query, key), before)
    one, two = (select([config(base_rate_sampling=base)], query, key) for base in (1, 2))
    assert torch.equal(one, two)
    queries = query.expand(-1, -1, 2, -1)
    mask = torch.zeros(1, 1, 2, 60)
    one, two = (select([config(base_rate_sampling=n)], queries, key, mask) for n in (1, 2))
    assert torch.equal(one, two)


def test_quantile_is_of_both_sides() -> None:
    masker = AdaptiveSamplingMasker.create_from_config(config(delta=0.05))
    assert masker.delta_ppf == pytest.approx(1.959964, abs=1e-5)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("base_rate_sampling", value) for value in (-1, -0.1, 1.0, True, "2", None)),
        *(("epsilon", value) for value in (0.0, 1.0, -0.1, 1, float("nan"), True, None)),
        *(("delta", value) for value in (0.0, 1.0, 2, float("nan"), False, "0.1")),
        *(("init_offset", value) for value in (-1, -0.1, 1.5, True, None, float("nan"))),
        *(("local_offset", value) for value in (-1, -0.1, 1.5, True, None, float("inf"))),
        *(("seed", value) for value in (-1, 1 << 63, 0.5)),
    ],
)
def test_fields_that_mean_nothing(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"^{field} must be .*got") as error:
        config(**{field: value})
    assert repr(value) in str(error.value)
