"""Double Sparsity, HashAttention, PQCache and SOCKET: scores by definition, and what they share."""

import itertools
import math

import pytest
import torch
from torch.nn import functional

from sparse_attention_hub.sparse_attention import (
    HashAttentionTopKMaskerConfig,
    PQCacheConfig,
    ResearchAttention,
    ResearchAttentionConfig,
    SinkMaskerConfig,
    SocketMaskerConfig,
)
from sparse_attention_hub.sparse_attention.research_attention.maskers.base import ResearchMasker
from sparse_attention_hub.sparse_attention.research_attention.maskers.fixed.implementations import (
    pq_top_k,
)
from sparse_attention_hub.sparse_attention.research_attention.maskers.fixed.implementations.pq_top_k import (  # noqa: E501
    MAX_TRAINING_KEYS,
    learned_codebook,
    nearest_centroids,
)
from sparse_attention_hub.sparse_attention.research_attention.maskers.fixed.implementations.utils.common_utils import (  # noqa: E501
    pseudo_quantize,
)
from sparse_attention_hub.sparse_attention.research_attention.maskers.fixed.implementations.utils.double_sparsity_utils import (  # noqa: E501
    load_sorted_channels_from_file,
)
from sparse_attention_hub.sparse_attention.research_attention.maskers.random_projections import (
    projections_of_layer,
)
from tests.hub.brute_force import additive, causal
from tests.hub.top_k_maskers import HEAD_SIZE, NAMES, hash_weights, tensors, top_k_configs

SHAPES = [(1, 1, 1, 1, 1), (2, 3, 1, 2, 9), (1, 4, 1, 1, 40), (1, 8, 1, 3, 70), (2, 4, 4, 1, 130)]
LAYER = 2


def scores_of(config, query, key, value, mask=None) -> torch.Tensor:
    masker = ResearchMasker.create_masker_from_config(config)
    return masker.scores(query, key, value, mask, {}, LAYER)


@pytest.mark.parametrize("shape", SHAPES)
def test_double_sparsity_scores(shape, tmp_path) -> None:
    _, heads, kv_heads, _, _ = shape
    query, key, value = tensors(*shape)
    for rows in {heads, kv_heads}:
        config = top_k_configs(tmp_path, rows, 4)["double sparsity"]
        data = load_sorted_channels_from_file(config.sorted_channel_file)
        order = data[f"model.layers.{LAYER}.self_attn.qk_proj"]
        found = scores_of(config, query, key, value)
        for h in range(heads):
            kept = order[h * rows // heads][: HEAD_SIZE // 4]
            own = pseudo_quantize(query[:, h][..., kept], 4)
            labels = pseudo_quantize(key[:, h * kv_heads // heads][..., kept], 4)
            expected = own @ labels.transpose(1, 2) * 2.0  # sqrt(group_factor)
            torch.testing.assert_close(found[:, h], expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_hash_scores(shape, tmp_path) -> None:
    _, heads, kv_heads, _, _ = shape
    query, key, value = tensors(*shape)
    for networks in {heads, kv_heads}:
        config = top_k_configs(tmp_path, networks, 4)["hash"]
        weights = hash_weights(networks)[LAYER]

        def signs(side: str, tensor: torch.Tensor, network: int, weights=weights) -> torch.Tensor:
            first, second = (m[network] for m in weights[f"{side}_matrix"])
            a, b = (m[network] for m in weights[f"{side}_bias"])
            return torch.sign(functional.silu(tensor @ first + a) @ second + b)

        found = scores_of(config, query, key, value)
        for h in range(heads):
            network = h * networks // heads
            own = signs("query", query[:, h], network)
            expected = own @ signs("key", key[:, h * kv_heads // heads], network).transpose(1, 2)
            assert torch.equal(found[:, h], expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_pq_scores(shape) -> None:
    _, heads, kv_heads, _, keys = shape
    query, key, value = tensors(*shape)
    config = PQCacheConfig(heavy_size=4, pq_sub_dim=4, pq_bits=3)
    prefix = 1 << int(math.log2(keys))
    book = learned_codebook(key[:, :, :prefix], 4, 3, 10)
    rebuilt = torch.empty_like(key)
    for m in range(HEAD_SIZE // 4):
        part = key[..., 4 * m : 4 * m + 4]
        nearest = torch.cdist(part, book[:, :, m]).argmin(dim=-1)
        index = nearest.unsqueeze(-1).expand_as(part)
        rebuilt[..., 4 * m : 4 * m + 4] = book[:, :, m].gather(2, index)
    expected = query @ rebuilt.repeat_interleave(heads // kv_heads, dim=1).transpose(2, 3)
    torch.testing.assert_close(scores_of(config, query, key, value), expected, atol=1e-4, rtol=1e-4)


def test_codebook_finds_clusters_and_never_gets_worse() -> None:
    generator = torch.Generator().manual_seed(3)
    centres = torch.randn(8, 4, generator=generator) * 10
    owner = torch.arange(400) // 50  # the start has one of each
    keys = (centres[owner] + torch.randn(400, 4, generator=generator) * 0.01)[None, None]
    book = learned_codebook(keys, 4, 3, 10)
    errors = torch.cdist(keys[0, 0], book[0, 0, 0]).amin(dim=1)
    assert errors.max() < 0.1
    assert (nearest_centroids(keys, book)[0, 0, :8, 0] != -1).all()
    noise = torch.randn(1, 2, 300, 8, generator=generator)

    def loss(iterations: int) -> float:
        book = learned_codebook(noise, 4, 4, iterations)
        parts = noise.unflatten(-1, (2, 4)).transpose(2, 3)
        return torch.cdist(parts, book).amin(dim=-1).square().sum().item()

    losses = [loss(iterations) for iterations in (1, 2, 4, 8, 16)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("limit", [1, 200, 5000])
def test_a_codebook_learned_in_pieces_is_the_same(monkeypatch, limit) -> None:
    """However many distances are held at once; small integers, so that ties are ties."""
    generator = torch.Generator().manual_seed(4)
    keys = torch.randint(-3, 4, (2, 3, 150, 8), generator=generator).float()
    some_keys = keys[:, :, :16].unflatten(-1, (2, 4)).transpose(2, 3)
    book, codes = learned_codebook(keys, 4, 4, 1), nearest_centroids(keys, some_keys)
    monkeypatch.setattr(pq_top_k, "_DISTANCES_ON_CPU", limit)
    assert torch.equal(learned_codebook(keys, 4, 4, 1), book)
    assert torch.equal(nearest_centroids(keys, some_keys), codes)


@pytest.mark.parametrize("limit", [1, 500, 1 << 20])
def test_sums_of_centroids_without_scattering(monkeypatch, limit) -> None:
    """As devices get them; of small integers, whose sums are exact in any order."""
    monkeypatch.setattr(pq_top_k, "_DISTANCES_ELSEWHERE", limit)
    generator = torch.Generator().manual_seed(4)
    parts = torch.randint(-9, 10, (2, 3, 5, 70, 4), generator=generator).float()
    nearest = torch.randint(0, 6, parts.shape[:-1], generator=generator)
    expected = pq_top_k._sums_of(parts, nearest, 8)
    for found, right in zip(pq_top_k._products_of(parts, nearest, 8), expected, strict=True):
        assert torch.equal(found, right)


def test_k_means_of_many_keys_sees_evenly_spaced_ones() -> None:
    """And is hardly worse for it: keys of a mixture, their distances to the nearest centroids."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(40, 8, generator=generator)
    chosen = torch.randint(40, (1, 2, 3 * MAX_TRAINING_KEYS), generator=generator)
    noise = torch.randn(*chosen.shape, 8, generator=generator)
    keys = centres[chosen] + 0.3 * noise
    book = learned_codebook(keys, 4, 5, 10)
    assert torch.equal(book, learned_codebook(keys[:, :, ::3], 4, 5, 10))

    def error(codebook: torch.Tensor) -> float:
        codes = nearest_centroids(keys, codebook).long()
        parts = keys.unflatten(-1, (2, 4))
        near = torch.stack(
            [codebook[0, :, m][torch.arange(2)[:, None], codes[0, :, :, m]] for m in range(2)], -2
        )
        return float((parts[0] - near).square().mean())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pq_top_k, "MAX_TRAINING_KEYS", keys.shape[2])
        whole = error(learned_codebook(keys, 4, 5, 10))
    assert error(book) < 1.1 * whole


@pytest.mark.parametrize("shape", SHAPES)
def test_socket_scores(shape) -> None:
    """By the softmax over all corners of the hypercube, as the paper states it."""
    _, heads, kv_heads, _, keys = shape
    query, key, value = tensors(*shape)
    bits, tables, tau = 3, 5, 0.4
    config = SocketMaskerConfig(heavy_size=4, K=bits, L=tables, tau=tau)
    planes = projections_of_layer({}, 42, LAYER, (kv_heads, HEAD_SIZE, tables * bits))
    corners = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=bits)))
    found = scores_of(config, query, key, value)
    for h in range(heads):
        g = h * kv_heads // heads
        projected = (query[:, h] @ planes[g]).unflatten(-1, (tables, bits))
        chance = torch.softmax(projected.tanh() @ corners.T / tau, dim=-1)  # (B, Q, L, R)
        signs = torch.where((key[:, g] @ planes[g]) >= 0, 1.0, -1.0).unflatten(-1, (tables, bits))
        bucket = (signs.unsqueeze(-2) == corners).all(-1).float().argmax(-1)  # (B, K, L)
        expected = torch.zeros(*query[:, h].shape[:2], keys)
        for table in range(tables):
            index = bucket[:, None, :, table].expand_as(expected)
            expected += chance[:, :, table].gather(-1, index)
        expected *= value[:, g].norm(dim=-1)[:, None]
        torch.testing.assert_close(found[:, h], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("granularity", ["query_head", "kv_head"])
@pytest.mark.parametrize("size", [3, 0.2])
@pytest.mark.parametrize("name", NAMES)
def test_a_row_alone_selects_what_it_selects_in_company(name, size, granularity, tmp_path) -> None:
    """Visible counts cross 32 and 64, where prefixes change; the second sequence is padded."""
    queries, keys, padding = 9, 68, 30
    config = ResearchAttentionConfig(
        [SinkMaskerConfig(2), top_k_configs(tmp_path, 4, size, granularity)[name]]
    )
    attention = ResearchAttention.create_from_config(config)
    query, key, value = tensors(2, 4, 2, queries, keys)
    mask = additive(causal(2, queries, keys, padding))
    found = attention.select(query, key, value, mask, 0.25, 0.0, {}, layer_idx=1).get_dense_mask()
    for row in range(queries):
        last = keys - queries + row + 1
        for b in range(2):
            alone = attention.select(
                query[b : b + 1, :, row : row + 1],
                key[b : b + 1, :, b * padding : last],
                value[b : b + 1, :, b * padding : last],
                None,
                0.25,
                0.0,
                {},
                layer_idx=1,
            ).get_dense_mask()
            # Pages start at the first key of the cache, padding or not.
            if name == "quest" and b:
                continue
            assert torch.equal(found[b, :, row, b * padding : last], alone[0, :, 0])


@pytest.mark.parametrize("name", NAMES)
def test_labels_kept_between_steps_are_those_made_anew(name, tmp_path) -> None:
    config = ResearchAttentionConfig([top_k_configs(tmp_path, 4, 5)[name]])
    attention = ResearchAttention.create_from_config(config)
    query, key, value = tensors(1, 4, 2, 80, 80)
    cache: dict = {}
    for last in (20, 21, 22, 25, 40, 63, 64, 65, 80, 30, 31):  # jumps, and a new sequence at 30
        for layer in (0, 2):
            arguments = (query[:, :, last - 1 : last], key[:, :, :last], value[:, :, :last], None)
            kept = attention.select(*arguments, 1.0, 0.0, cache, layer_idx=layer)
            anew = attention.select(*arguments, 1.0, 0.0, {}, layer_idx=layer)
            assert torch.equal(kept.get_dense_mask(), anew.get_dense_mask())


@pytest.mark.parametrize("name", NAMES)
def test_a_group_selects_the_same_keys(name, tmp_path) -> None:
    config = top_k_configs(tmp_path, 8, 6, "kv_head")[name]
    attention = ResearchAttention.create_from_config(ResearchAttentionConfig([config]))
    query, key, value = tensors(2, 8, 2, 1, 60)
    found = attention.select(query, key, value, None, 0.25, 0.0, {}, layer_idx=0).get_dense_mask()
    groups = found.view(2, 2, 4, 60)
    assert torch.equal(groups, groups[:, :, :1].expand_as(groups))
    assert not torch.equal(groups[:, 0], groups[:, 1])
    if name != "quest":
        masker = attention.maskers[0]
        scores = masker.scores(query, key, value, None, {}, 0).view(2, 2, 4, 60) * 0.25
        pooled = scores.softmax(dim=-1).mean(dim=2)
        for b, g in itertools.product(range(2), range(2)):
            ranked = sorted(range(60), key=lambda k: (-pooled[b, g, k].item(), k))
            assert set(groups[b, g, 0].nonzero().flatten().tolist()) == set(ranked[:6])


def test_every_layer_has_its_own_channels(tmp_path) -> None:
    """The field's API reuses the first layer's channels everywhere."""
    config = top_k_configs(tmp_path, 4, 5)["double sparsity"]
    masker = ResearchMasker.create_masker_from_config(config)
    query, key, value = tensors(1, 4, 2, 1, 50)
    first, second = (masker.scores(query, key, value, None, {}, layer) for layer in (0, 1))
    assert not torch.equal(first, second)
    with pytest.raises(ValueError, match=r"no entry 'model.layers.7.self_attn.qk_proj'"):
        masker.scores(query, key, value, None, {}, 7)


@pytest.mark.parametrize("name", ["double sparsity", "hash"])
def test_labels_that_do_not_fit_the_model_are_refused(name, tmp_path) -> None:
    config = top_k_configs(tmp_path, 3, 5)[name]
    masker = ResearchMasker.create_masker_from_config(config)
    query, key, value = tensors(1, 4, 2, 1, 50)
    with pytest.raises(ValueError, match="heads"):
        masker.scores(query, key, value, None, {}, 0)


def test_sub_vectors_must_divide_the_head() -> None:
    with pytest.raises(ValueError, match="pq_sub_dim must divide the head size 16, got 5"):
        scores_of(PQCacheConfig(4, 5, 3), *tensors(1, 1, 1, 1, 9))


def test_hash_weights_of_another_shape_are_refused() -> None:
    config = HashAttentionTopKMaskerConfig(4, 32, 2, 24, "relu", hat_weights=hash_weights(2))
    with pytest.raises(ValueError, match="widths"):
        ResearchMasker.create_masker_from_config(config)
