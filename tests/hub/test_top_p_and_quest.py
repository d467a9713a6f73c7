"""Oracle top-p and Quest against their definitions, one query and head at a time."""

import math

import pytest
import torch

from sparse_attention_hub.sparse_attention import (
    LocalMaskerConfig,
    Mask,
    OracleTopPMaskerConfig,
    QuestTopKMasker,
    QuestTopKMaskerConfig,
    ResearchAttention,
    ResearchAttentionConfig,
    SinkMaskerConfig,
    TopKMasker,
)
from sparse_attention_hub.sparse_attention.research_attention.maskers.base import MaskerConfig
from sparse_attention_hub.sparse_attention.research_attention.maskers.fixed.implementations.utils import (  # noqa: E501
    common_utils,
    quest_utils,
)
from tests.hub.brute_force import additive, causal, integers

SHAPES = [(1, 1, 1, 1, 1), (1, 4, 1, 1, 40), (2, 3, 3, 4, 4), (3, 6, 2, 5, 37), (1, 8, 1, 3, 130)]
TOP_P = [OracleTopPMaskerConfig(p) for p in (0.0, 0.25, 0.77, 1.0)]
QUEST = [
    QuestTopKMaskerConfig(size, page, bits)
    for size, page, bits in [
        (1, 1, 16),
        (20, 4, 16),
        (1000, 8, 16),
        (0.3, 8, 16),
        (0.5, 2, 16),
        (1.0, 16, 16),
        (16, 4, 8),
        (16, 4, 4),
        (16, 4, 2),
    ]
]
CONFIGS = [*TOP_P, *QUEST]
EXACT = [*TOP_P, *(config for config in QUEST if config.label_bits == 16)]


def quantized(row: list[float], bits: int) -> list[float]:
    low, high = min(row), max(row)
    if bits == 16 or low == high:
        return row
    step = (high - low) / (2**bits - 1)
    return [round((value - low) / step) * step + low for value in row]


def quest(config, query: list[float], key: list[list[float]], seen: list[int], chosen: set[int]):
    """The keys of the best pages, by name of key position."""
    wanted = config.heavy_size
    wanted = int(wanted * len(seen)) if isinstance(wanted, float) else wanted
    pages: dict[int, list[int]] = {}
    for k in seen:
        pages.setdefault(k // config.page_size, []).append(k)

    def bound(page: int) -> float:
        columns = list(zip(*(key[k] for k in pages[page]), strict=True))
        low = quantized([min(column) for column in columns], config.label_bits)
        high = quantized([max(column) for column in columns], config.label_bits)
        return sum(max(q * a, q * b) for q, a, b in zip(query, low, high, strict=True))

    open_pages = [page for page, keys in pages.items() if set(keys) - chosen]
    count = len(pages) if wanted >= len(seen) else max(3, wanted // config.page_size)
    best = sorted(open_pages, key=lambda page: (-bound(page), page))[:count]
    return {k for page in best for k in pages[page]}


def top_p(config, query: list[float], key: list[list[float]], seen: list[int], chosen: set[int]):
    """The heaviest keys until their weight exceeds the share, and those that tie with the last."""
    rest = [k for k in seen if k not in chosen]
    if not rest:
        return set()
    score = {k: sum(a * b for a, b in zip(query, key[k], strict=True)) for k in rest}
    top = max(score.values())
    ranked = sorted(rest, key=lambda k: -score[k])
    total, mass = sum(math.exp(score[k] - top) for k in rest), 0.0
    for last in ranked:
        mass += math.exp(score[last] - top)
        if mass > config.top_p * total:
            break
    return {k for k in rest if score[k] >= score[last]}


def expected(configs: list[MaskerConfig], query, key, visible) -> torch.Tensor:
    batch, heads, queries, _ = query.shape
    keys, group = key.shape[2], heads // key.shape[1]
    result = torch.zeros(batch, heads, queries, keys, dtype=torch.bool)
    for b, h, q in torch.cartesian_prod(*map(torch.arange, (batch, heads, queries))).tolist():
        seen = visible[b, q].nonzero().flatten().tolist()
        chosen: set[int] = set()
        for config in configs:
            if isinstance(config, SinkMaskerConfig):
                chosen |= set(seen[: config.sink_size])
            elif isinstance(config, LocalMaskerConfig):
                chosen |= {k for k in seen if k > keys - queries + q - config.window_size}
            else:
                rule = quest if isinstance(config, QuestTopKMaskerConfig) else top_p
                arguments = query[b, h, q].tolist(), key[b, h // group].tolist()
                chosen |= rule(config, *arguments, seen, set(chosen))
        result[b, h, q, sorted(chosen)] = True
    return result


def select(configs, query, key, mask) -> torch.Tensor:
    attention = ResearchAttention.create_from_config(ResearchAttentionConfig(configs))
    return attention.select(query, key, key, mask, 1.0, 0.0, {}).get_dense_mask() > 0


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("config", CONFIGS, ids=repr)
def test_selection_is_its_definition(config: MaskerConfig, shape) -> None:
    batch, _, _, queries, keys = shape
    query, key = integers(*shape)
    if getattr(config, "label_bits", 16) < 16:
        # Levels are no integers: equal pages would differ by rounding. Here no two are equal.
        key = key + torch.rand(key.shape, generator=torch.Generator().manual_seed(3))
    visible = causal(batch, queries, keys, padding=1)
    for configs in ([config], [SinkMaskerConfig(2), config], [config, LocalMaskerConfig(3)]):
        reference = expected(configs, query, key, visible)
        for mask in (additive(visible), visible[:, None]):
            assert torch.equal(select(configs, query, key, mask) & visible[:, None], reference)
    if queries == 1:
        everything = torch.ones(batch, queries, keys, dtype=torch.bool)
        reference = expected([config], query, key, everything)
        assert torch.equal(select([config], query, key, None), reference)


@pytest.mark.parametrize("config", CONFIGS, ids=repr)
def test_a_row_alone_selects_what_it_selects_in_company(config: MaskerConfig) -> None:
    query, key = integers(1, 4, 2, 7, 45)
    together = select([config], query, key, additive(causal(1, 7, 45)))
    for row in range(7):
        last = 45 - 7 + row + 1
        alone = select([config], query[:, :, row : row + 1], key[:, :, :last], None)
        assert torch.equal(together[:, :, row, :last], alone[:, :, 0])


@pytest.mark.parametrize("config", CONFIGS, ids=repr)
def test_earlier_selections_stay_and_nothing_of_the_caller_changes(config) -> None:
    query, key = integers(1, 2, 1, 3, 29)
    mask = additive(causal(1, 3, 29))
    weights = torch.zeros(1, 2, 3, 29)
    weights[..., 4] = 0.25
    previous = Mask.create_mask_from_dense_mask((1, 2, 3, 29), weights, torch.float32)
    before = mask.clone(), key.clone(), query.clone()
    masker = ResearchAttention.create_from_config(ResearchAttentionConfig([config])).maskers[0]
    found = masker.add_mask(key, query, key, mask, 1.0, 0.0, {}, previous).get_dense_mask()
    assert torch.equal(previous.get_dense_mask(), weights)
    assert all(torch.equal(*pair) for pair in zip(before, (mask, key, query), strict=True))
    assert (found >= weights).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("config", EXACT, ids=repr)
def test_half_precision_selects_the_same(config: MaskerConfig, dtype: torch.dtype) -> None:
    """Small integers are exact in any dtype; quantised labels are rounded to the keys' dtype."""
    query, key = integers(2, 4, 2, 3, 33)
    mask = additive(causal(2, 3, 33))
    half = select([config], query.to(dtype), key.to(dtype), mask.to(dtype))
    assert torch.equal(half, select([config], query, key, mask))


def test_page_bounds_hold() -> None:
    """Quest's own promise: no key of a page scores higher than the page."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 6, 3, 8, generator=generator)
    key = torch.randn(2, 2, 37, 8, generator=generator)
    low, high = quest_utils.compute_page_min_max(key, 8, 5)
    bounds = quest_utils.quest_page_scores(query, low, high).repeat_interleave(8, -1)[..., :37]
    scores = query @ key.repeat_interleave(3, 1).mT
    assert (scores <= bounds + 1e-5).all()


def test_pages_as_in_the_fields_api() -> None:
    pages = torch.tensor([[[[2, 0]], [[1, 1]]]])
    found = quest_utils.pages_to_token_mask(pages, 10, 4, torch.device("cpu"), torch.float16)
    assert found.dtype == torch.float16
    assert found.tolist() == [[[[1] * 4 + [0] * 4 + [1] * 2], [[0] * 4 + [1] * 4 + [0] * 2]]]
    shown = torch.tensor([[[True, False, False, False, True, False]]])
    for mask in (shown, torch.zeros(shown.shape).masked_fill(~shown, -torch.inf) - shown.float()):
        allowed = quest_utils.attention_mask_to_allowed_prob(mask, 5)
        assert allowed.tolist() == [[[[1, 0, 0, 0, 1]]]]
    by_head = torch.cat([allowed, torch.zeros_like(allowed)], dim=1)
    assert quest_utils.pages_valid(by_head, 2, 3).tolist() == [[[True, False, True]]]
    assert quest_utils.pages_valid(by_head, 2, 4).tolist() == [[[True, False, True, False]]]
    with pytest.raises(ValueError, match="num_pages must be >= 3, got 2"):
        quest_utils.pages_valid(by_head, 2, 2)


def test_scores_of_keys_are_those_of_their_pages() -> None:
    query, key = integers(2, 4, 2, 3, 33)
    mask = additive(causal(2, 3, 33))
    masker = QuestTopKMasker.create_from_config(QuestTopKMaskerConfig(12, 4))
    assert isinstance(masker, TopKMasker)
    bounds = masker.scores(query, key, key, mask, {}, 0)
    scores = (query @ key.repeat_interleave(2, 1).mT).masked_fill(mask < 0, -torch.inf)
    assert bounds.shape == scores.shape
    assert (scores <= bounds).all()
    assert torch.equal(bounds[..., :32:4], bounds[..., 3:32:4])


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_quantised_labels_are_as_close_as_their_bits_allow(bits: int) -> None:
    labels = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(1))
    found = common_utils.pseudo_quantize(labels, bits)
    span = labels.amax(-1, keepdim=True) - labels.amin(-1, keepdim=True)
    assert ((found - labels).abs() <= span / (2**bits - 1) / 2 + 1e-6).all()
    for row in found.flatten(0, 1):
        assert len(row.unique()) <= 2**bits
    constant = torch.full((2, 4), 3.0)
    assert torch.equal(common_utils.pseudo_quantize(constant, bits), constant)


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan"), True, "0.5", None])
def test_shares_that_mean_nothing(value: object) -> None:
    with pytest.raises(ValueError, match=r"top_p must be a number in \[0, 1\]"):
        OracleTopPMaskerConfig(value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"page_size": 0}, r"page_size must be an integer in \[1, 65536\], got 0"),
        ({"page_size": 1.5}, r"page_size must be an integer in \[1, 65536\], got 1.5"),
        ({"page_size": True}, r"page_size must be an integer in \[1, 65536\], got True"),
        ({"page_size": 8, "label_bits": 0}, r"label_bits must be an integer in \[1, 16\], got 0"),
        ({"page_size": 8, "label_bits": 17}, r"label_bits must be an integer in \[1, 16\], got 17"),
        ({"page_size": 8, "heavy_size": 0}, "heavy_size"),
    ],
)
def test_quest_fields_that_mean_nothing(fields, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QuestTopKMaskerConfig(**{"heavy_size": 8, **fields})
