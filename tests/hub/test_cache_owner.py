"""What a cache keeps belongs to one layer, one sequence and one masker."""

import gc

import pytest
import torch

from sparse_attention_hub.sparse_attention import (
    AdaptiveSamplingMaskerConfig,
    MagicPigConfig,
    Mask,
    RandomSamplingMaskerConfig,
    ResearchAttention,
    ResearchAttentionConfig,
    SinkMaskerConfig,
)
from sparse_attention_hub.sparse_attention.research_attention.maskers import key_labels
from sparse_attention_hub.sparse_attention.research_attention.maskers.base import ResearchMasker
from tests.hub.top_k_maskers import NAMES, hash_weights, tensors, top_k_configs

NEED_LAYERS = ("double sparsity", "hash", "socket", "magic pig")
SAMPLERS = {
    "magic pig": MagicPigConfig(lsh_l=12, lsh_k=3),
    "random": RandomSamplingMaskerConfig(0.2),
    "adaptive": AdaptiveSamplingMaskerConfig(0.1, 0.3, 0.2, 2, 0.05),
}
ALL = (*NAMES, *SAMPLERS)


def attention_of(name: str, folder) -> ResearchAttention:
    config = {**top_k_configs(folder, 4, 5), **SAMPLERS}[name]
    return ResearchAttention.create_from_config(ResearchAttentionConfig([config]))


def selected(attention, tensors, cache, **kwargs) -> torch.Tensor:
    query, key, value = tensors
    mask = attention.select(query, key, value, None, 0.25, 0.0, cache, **kwargs)
    return mask.get_dense_mask()


@pytest.mark.parametrize("keys", [3, 40])  # 3: fewer than what is selected
@pytest.mark.parametrize("name", NEED_LAYERS)
def test_what_has_tables_for_each_layer_must_know_the_layer(name, keys, tmp_path) -> None:
    attention = attention_of(name, tmp_path)
    for cache, kwargs, missing in (
        ({}, {}, "layer_idx"),
        ({}, {"layer_idx": None}, "layer_idx"),
        (None, {"layer_idx": 0}, "sparse_meta_data"),
    ):
        with pytest.raises(ValueError, match=f"needs {missing}, which is missing or None"):
            selected(attention, tensors(1, 4, 2, 1, keys), cache, **kwargs)


@pytest.mark.parametrize("name", [name for name in ALL if name not in NEED_LAYERS])
def test_layers_that_nobody_told_apart_share_nothing(name, tmp_path) -> None:
    attention = attention_of(name, tmp_path)
    cache: dict = {}
    for layer, kwargs in enumerate(({}, {"layer_idx": None}, {})):
        inputs = tensors(1, 4, 2, 1, 40, seed=layer)
        expected = selected(attention, inputs, {}, layer_idx=0)
        assert torch.equal(selected(attention, inputs, cache, **kwargs), expected)
        assert torch.equal(selected(attention, inputs, None, **kwargs), expected)
        assert torch.equal(selected(attention, inputs, None, layer_idx=0), expected)


@pytest.mark.parametrize("kwargs", [{}, {"layer_idx": None}])
def test_maskers_by_layer_must_know_the_layer(kwargs) -> None:
    for config in (
        ResearchAttentionConfig([SinkMaskerConfig(3)], dense_layers=(0,)),
        ResearchAttentionConfig([], layer_masker_configs={1: [SinkMaskerConfig(3)]}),
    ):
        attention = ResearchAttention.create_from_config(config)
        with pytest.raises(ValueError, match="layer_idx must be given"):
            selected(attention, tensors(1, 4, 2, 1, 9), {}, **kwargs)


@pytest.mark.parametrize("name", ALL)
def test_a_new_prompt_has_labels_of_its_own(name, tmp_path) -> None:
    """A longer one too, which nothing but its first call tells from a continued one."""
    attention = attention_of(name, tmp_path)
    cache: dict = {}
    for seed, prompt in ((0, 20), (1, 33), (2, 33), (3, 1)):
        query, key, value = tensors(2, 4, 2, prompt + 4, prompt + 4, seed=seed)
        alone: dict = {}
        for first, last in ((0, prompt), *((n - 1, n) for n in range(prompt + 1, prompt + 5))):
            inputs = (query[:, :, first:last], key[:, :, :last], value[:, :, :last])
            for layer in (0, 2):
                found = selected(attention, inputs, cache, layer_idx=layer)
                assert torch.equal(found, selected(attention, inputs, alone, layer_idx=layer))


@pytest.mark.parametrize("name", [name for name in NAMES if name != "oracle"])
def test_a_decode_step_labels_new_keys_alone(name, tmp_path, monkeypatch) -> None:
    labelled: list[int] = []
    append = key_labels._GrowingLabels.append

    def counted(self, labels: torch.Tensor) -> None:
        labelled.append(labels.shape[2])
        append(self, labels)

    monkeypatch.setattr(key_labels._GrowingLabels, "append", counted)
    attention = attention_of(name, tmp_path)
    query, key, value = tensors(1, 4, 2, 1, 60)
    cache: dict = {}
    for last in range(40, 61):
        selected(attention, (query, key[:, :, :last], value[:, :, :last]), cache, layer_idx=0)
    assert labelled
    assert set(labelled) == {1}


def test_a_cache_is_of_no_use_to_another_network(tmp_path) -> None:
    """Also when the other one has taken the place in memory of one that is gone."""
    query, key, value = tensors(1, 4, 2, 1, 40)
    previous = Mask.create_empty_mask((1, 4, 1, 40), torch.float32, torch.device("cpu"))
    cache: dict = {}
    arguments = (key, query, value, None, 0.25, 0.0)
    config = top_k_configs(tmp_path, 4, 5)["hash"]
    for run in range(20):
        for parts in hash_weights(4).values():
            config.hat_weights[0]["key_matrix"] = [
                matrix * (-1) ** run + run for matrix in parts["key_matrix"]
            ]
        masker = ResearchMasker.create_masker_from_config(config)
        found = masker.add_mask(*arguments, cache, previous, layer_idx=0).get_dense_mask()
        anew = masker.add_mask(*arguments, {}, previous, layer_idx=0).get_dense_mask()
        assert torch.equal(found, anew)
        del masker
        gc.collect()
