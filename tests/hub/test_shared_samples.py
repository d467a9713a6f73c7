"""Query heads of a KV head that sample together: what they share, and what holds for each."""

import math
from statistics import NormalDist

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_attention_hub.sparse_attention import (
    AdaptiveSamplingMaskerConfig,
    LocalMaskerConfig,
    Mask,
    OracleTopKConfig,
    RandomSamplingMaskerConfig,
    ResearchAttention,
    ResearchAttentionConfig,
    SinkMaskerConfig,
)
from sparse_attention_hub.sparse_attention.research_attention.maskers.sampling.base import (
    pooled_mask,
)
from sparse_attention_hub.sparse_attention.research_attention.maskers.single_row import pooled_rows
from sparse_attention_hub.sparse_attention.utils.mask_attention_utils import (
    get_attention_denominator,
    get_attention_numerator,
)
from tests.hub.brute_force import causal, integers
from tests.hub.test_adaptive_sampling import allowed_share, relative_error
from tests.hub.test_random_sampling import splitmix

LEAST = torch.finfo(torch.float32).min


def random_sampling(rate: float = 0.2, granularity: str = "kv_head", seed: int = 42):
    return RandomSamplingMaskerConfig(rate, seed=seed, head_granularity=granularity)


def adaptive(base=0.1, epsilon: float = 0.3, granularity: str = "kv_head", seed: int = 42):
    return AdaptiveSamplingMaskerConfig(
        base, epsilon, 0.2, 2, 0.05, seed=seed, head_granularity=granularity
    )


def select(maskers, query, key, mask=None, scaling: float = 0.25, layer: int = 3) -> torch.Tensor:
    attention = ResearchAttention.create_from_config(ResearchAttentionConfig(maskers))
    found = attention.select(query, key, key, mask, scaling, 0.0, {}, layer_idx=layer)
    return found.get_dense_mask()


def budget(mass: list[float], static: float, size: int, epsilon: float, delta: float) -> int:
    """Keys to sample beyond a base sample; the formula of `AdaptiveSamplingMasker`."""
    rest = size - len(mass)
    mean = sum(mass) / max(1, len(mass))
    variance = sum((part - mean) ** 2 for part in mass) / max(1, len(mass) - 1)
    quantile = NormalDist().inv_cdf(1 - delta / 2)
    wanted = (quantile * math.sqrt(variance) * rest / (epsilon * (static + mean * size))) ** 2
    return min(max(math.ceil(wanted / (1 + wanted / max(1, rest))), len(mass)), rest)


def shared_sample(config, query, key, visible, before, layer: int = 3) -> torch.Tensor:
    """The definition, one group and query at a time.

    `visible` is `(B, H, Q, K)`, `before` what other maskers select, of the same shape. Returns
    weights of that shape, 0 where a head does not see the key.
    """
    weights = before.double() * visible
    batch, heads, queries, keys = before.shape
    group = heads // key.shape[1]
    for b in range(batch):
        for first in range(0, heads, group):
            for q in range(queries):
                own = range(first, first + group)
                open_to = [{k for k in range(keys) if visible[b, h, q, k]} for h in own]
                held = {k for h in own for k in range(keys) if weights[b, h, q, k]}
                if isinstance(config, AdaptiveSamplingMaskerConfig):
                    for seen in map(sorted, open_to):
                        stop = len(seen) - int(len(seen) * config.local_offset)
                        held |= {*seen[: config.init_offset], *seen[stop:]}
                rest = [k for k in range(keys) if any(k in seen for seen in open_to)]
                rest = [k for k in rest if k not in held]
                position, start = len(open_to[0]) - 1, min(open_to[0], default=0)
                counter = (config.seed, layer, first, position)
                rest.sort(key=lambda k: splitmix(*counter, (k - start) % 2**64))
                if isinstance(config, RandomSamplingMaskerConfig):
                    base, count = 0, min(len(rest), max(1, int(len(rest) * config.sampling_rate)))
                else:
                    base = min(len(rest), max(2, int(len(rest) * config.base_rate_sampling)))
                    count = 0
                    for h, seen in zip(own, open_to, strict=True):
                        scores = key[b, first // group] @ query[b, h, q] * 0.25
                        mass = torch.exp(scores - scores[sorted(seen)].max()).double()
                        of_base = [mass[k].item() * (k in seen) for k in rest[:base]]
                        static = sum(mass[k].item() for k in held & seen)
                        count = max(
                            count,
                            budget(of_base, static, len(rest), config.epsilon, config.delta),
                        )
                for h, seen in zip(own, open_to, strict=True):
                    for k in seen & (held | set(rest[:base])):
                        weights[b, h, q, k] = 1
                    for k in seen & set(rest[base : base + count]):
                        weights[b, h, q, k] = count / (len(rest) - base)
    return weights


@pytest.mark.parametrize("config", [random_sampling(), adaptive(), adaptive(0.1, 0.05)])
@pytest.mark.parametrize("shape", [(1, 8, 2, 1, 65), (2, 6, 3, 3, 37), (1, 4, 1, 2, 90)])
@pytest.mark.parametrize("heads_see_the_same", [True, False])
def test_the_sample_is_its_definition(config, shape, heads_see_the_same: bool) -> None:
    """Also with attention masks of single query heads, which hide other keys from each."""
    query, key = integers(*shape, seed=1)
    batch, heads, _, queries, keys = shape
    visible = causal(batch, queries, keys, padding=3)[:, None].repeat(1, heads, 1, 1)
    if not heads_see_the_same:
        visible &= torch.rand(visible.shape, generator=torch.Generator().manual_seed(0)) < 0.8
        visible[..., 5] = True
    mask = torch.zeros(visible.shape).masked_fill(~visible, LEAST)
    others = [SinkMaskerConfig(2), OracleTopKConfig(0.1)]
    before = select(others, query, key, mask) > 0
    expected = shared_sample(config, query, key, visible, before)
    found = select([*others, config], query, key, mask) * visible
    assert torch.equal(found > 0, expected > 0)
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=0)
    if heads_see_the_same:
        assert torch.equal(
            *found.view(batch, -1, heads // shape[2], queries, keys)[:, :, :2].unbind(2)
        )


@given(
    heads=st.integers(1, 4),
    queries=st.integers(1, 3),
    keys=st.integers(3, 60),
    is_adaptive=st.booleans(),
    seed=st.integers(0, 2**63 - 1),
    has_mask=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_heads_of_their_own_keys_sample_as_ever(
    heads, queries, keys, is_adaptive, seed, has_mask
) -> None:
    query, key = integers(1, heads, heads, queries, keys, seed % 1000)
    mask = None
    if has_mask:
        visible = causal(1, queries, keys)
        mask = torch.zeros(visible.shape).masked_fill(~visible, LEAST)[:, None]
    make = adaptive if is_adaptive else random_sampling
    before = [SinkMaskerConfig(1), OracleTopKConfig(2)]
    one, other = (
        select([*before, make(granularity=name, seed=seed)], query, key, mask)
        for name in ("query_head", "kv_head")
    )
    assert torch.equal(one, other)


@pytest.mark.parametrize("make", [random_sampling, adaptive])
def test_a_group_reads_one_sample_and_other_groups_read_others(make) -> None:
    query, key = (torch.randn(1, n, m, 16) for n, m in ((8, 1), (2, 500)))
    before = [SinkMaskerConfig(2), LocalMaskerConfig(4), OracleTopKConfig(0.02)]
    shared = select([*before, make()], query, key)[0, :, 0].view(2, 4, 500)
    assert torch.equal(shared, shared[:, :1].expand(2, 4, 500))
    sampled = (shared[:, 0] > 0) & (shared[:, 0] < 1)
    assert not torch.equal(*sampled)
    alone = select([*before, make(granularity="query_head")], query, key)[0, :, 0].view(2, 4, 500)
    # What a group loads is what one of its heads reads; heads alone load more together.
    assert ((shared > 0).any(1).sum() < (alone > 0).any(1).sum()).item()


def test_a_row_alone_has_the_sample_it_has_in_company() -> None:
    query, key = integers(1, 4, 2, 7, 145)
    visible = causal(1, 7, 145)
    mask = torch.zeros(visible.shape).masked_fill(~visible, LEAST)[:, None]
    for config in (random_sampling(), adaptive(0.1, 0.2)):
        maskers = [SinkMaskerConfig(2), OracleTopKConfig(0.05), config]
        together = select(maskers, query, key, mask)
        for row in range(7):
            last = 145 - 7 + row + 1
            alone = select(maskers, query[:, :, row : row + 1], key[:, :, :last])
            assert torch.equal(together[:, :, row, :last], alone[:, :, 0])


@pytest.mark.parametrize("make", [random_sampling, adaptive])
def test_numerator_and_denominator_of_every_head_are_unbiased(make) -> None:
    """Means over 1,000 seeds within 5 standard errors, with a sink that is every row's maximum.

    The heads of a group have heavy hitters of their own before they sample together.
    """
    generator = torch.Generator().manual_seed(6)
    query, key, value = (
        torch.randn(1, heads, n, 8, generator=generator)
        for heads, n in ((4, 1), (2, 121), (2, 121))
    )
    # In a direction that only the sink has, at position 0; 0.3 is the scaling.
    query[..., 7], key[..., 7] = 1.0, 0.0
    above = (query @ key.repeat_interleave(2, 1).mT).amax() + 0.1 + math.log(120) / 0.3
    key[:, :, 0] = 0.0
    key[:, :, 0, 7] = above
    shape = (1, 4, 1, 121)
    full = Mask.create_full_mask(shape, torch.float32, query.device)

    def estimate(mask: Mask) -> torch.Tensor:
        arguments = (None, query, key, None, 0.3, 0.0, mask)
        numerator = get_attention_numerator(*arguments[:3], value, *arguments[3:])
        return torch.cat([get_attention_denominator(*arguments), numerator], dim=-1).double()

    before = [SinkMaskerConfig(1), OracleTopKConfig(4)]
    found, sizes = [], set()
    for seed in range(1000):
        config = make(seed=seed) if make is random_sampling else make(8, 0.004, seed=seed)
        weights = select([*before, config], query, key, scaling=0.3)
        sizes.add(int((weights > 0).sum()))
        found.append(estimate(Mask.create_mask_from_dense_mask(shape, weights, torch.float32)))
    held = select(before, query, key, scaling=0.3)[0, :, 0] > 0
    assert not torch.equal(held[0], held[1])
    assert max(sizes) < 4 * 121
    assert len(sizes) == 1 if make is random_sampling else len(sizes) > 5
    estimates = torch.stack(found)
    error = estimates.std(0) / math.sqrt(len(found))
    truth = estimate(full)
    assert (error[..., 0] > 0).all()
    assert ((estimates.mean(0) - truth).abs() <= 5 * error + 1e-6 * truth.abs()).all()


def test_the_error_of_every_head_stays_within_epsilon_as_often_as_promised() -> None:
    """A head whose scores are wide, beside one whose scores are flat."""
    generator = torch.Generator().manual_seed(0)
    rows, epsilon, delta = 512, 0.1, 0.2
    key = torch.randn(rows, 1, 2000, 2, generator=generator)
    query = torch.tensor([[1.5, 0.0], [0.0, 0.3]]).view(1, 2, 1, 2).expand(rows, 2, 1, 2)
    config = AdaptiveSamplingMaskerConfig(0.02, epsilon, delta, 0, 0, head_granularity="kv_head")
    weights = select([OracleTopKConfig(0.02), config], query, key, scaling=1.0)[:, :, 0]
    scores = (query @ key.mT)[:, :, 0]
    for head in range(2):
        failures = (relative_error(scores[:, head], weights[:, head]) > epsilon).sum()
        assert failures / rows <= allowed_share(delta, rows)


@given(
    units=st.integers(1, 3),
    group=st.integers(1, 4),
    listed=st.integers(0, 9),
    keys=st.integers(9, 40),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_pooling_by_index_is_pooling_of_dense_weights(units, group, listed, keys, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = (2, units * group, 1, keys)
    indices = torch.rand(shape, generator=generator).argsort(dim=-1)[..., :listed]
    weights = torch.randint(0, 5, indices.shape, generator=generator) / 4
    mask = Mask.create_from_rows(shape, indices, weights)
    dense = Mask.create_mask_from_dense_mask(shape, mask.get_dense_mask(), torch.float32)
    pooled = pooled_rows(mask, units)
    found = pooled.get_dense_mask()
    assert torch.equal(found, pooled_mask(dense, units).get_dense_mask())
    expected = dense.get_dense_mask().view(2, units, group, keys).amax(2)
    assert torch.equal(found, expected.repeat_interleave(group, 1).view(shape))
    assert pooled.count_active() == int((found > 0).sum())
