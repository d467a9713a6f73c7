"""Maskers that do not fit the model are found before they run in a step."""

import json
from dataclasses import InitVar, dataclass
from typing import Any

import pytest

from sparse_attention_hub.sparse_attention.research_attention.maskers.base import (
    MaskerConfig,
    MaskerRegistry,
    ResearchMasker,
    require_config,
)
from sparse_attention_hub.sparse_attention.research_attention.maskers.sampling.implementations import (  # noqa: E501
    magic_pig,
)
from sparse_attention_hub.sparse_attention.serialization import config_from_dict, config_to_json
from vllm_sparse_plugin import trial
from vllm_sparse_plugin.trial import AttentionShape, try_maskers

SHAPE = AttentionShape(num_layers=3, num_heads=4, num_kv_heads=2, head_size=16)


def text(*maskers: dict, **rest) -> str:
    return config_to_json(config_from_dict({"maskers": list(maskers), **rest}))


def test_maskers_that_fit_pass() -> None:
    pq = {"type": "pq_cache", "heavy_size": 2, "pq_sub_dim": 4, "pq_bits": 2}
    try_maskers(text({"type": "sink", "sink_size": 1}, pq), SHAPE)


def test_a_misfit_names_its_layer() -> None:
    pq = {"type": "pq_cache", "heavy_size": 2, "pq_sub_dim": 5, "pq_bits": 2}
    with pytest.raises(
        ValueError, match=r"layer 0, pq_cache: pq_sub_dim must divide the head size 16"
    ):
        try_maskers(text(pq), SHAPE)
    with pytest.raises(
        ValueError, match=r"layer 2, pq_cache: pq_sub_dim must divide the head size 16"
    ):
        try_maskers(text(layers={"2": [pq]}), SHAPE)


def test_files_are_read_before_the_first_step(tmp_path) -> None:
    path = tmp_path / "channels.json"
    path.write_text("{}")
    masker = {"type": "double_sparsity_top_k", "heavy_size": 2, "sorted_channel_file": str(path)}
    with pytest.raises(ValueError, match="no entry 'model.layers.0"):
        try_maskers(text(masker), SHAPE)


BEHIND = [{"type": "sink", "sink_size": 16}, {"type": "local", "window_size": 64}]
"""What selects all of the keys of a trial."""


@pytest.mark.parametrize(
    ("masker", "reason"),
    [
        (
            {"type": "pq_cache", "heavy_size": 50, "pq_sub_dim": 5, "pq_bits": 2},
            "layer 0, pq_cache: pq_sub_dim must divide the head size 16",
        ),
        (
            {"type": "double_sparsity_top_k", "heavy_size": 50, "group_factor": 1000},
            "layer 0, double_sparsity_top_k: group_factor must be at most the head size 16",
        ),
    ],
)
def test_a_misfit_behind_others_is_found(masker: dict, reason: str, tmp_path) -> None:
    """On a few keys those would leave nothing for it to do, on many it would end the engine."""
    if masker["type"] == "double_sparsity_top_k":
        path = tmp_path / "channels.json"
        order = [list(range(16))] * 4
        layers = {f"model.layers.{layer}.self_attn.qk_proj": order for layer in range(3)}
        path.write_text(json.dumps(layers))
        masker = {**masker, "sorted_channel_file": str(path)}
    with pytest.raises(ValueError, match=reason):
        try_maskers(text(*BEHIND, masker), SHAPE)
    with pytest.raises(ValueError, match=reason.replace("layer 0", "layer 1")):
        try_maskers(text(*BEHIND, layers={"1": [*BEHIND, masker]}), SHAPE)
    try_maskers(text(*BEHIND, masker, dense_layers=[0, 1, 2]), SHAPE)


@pytest.mark.parametrize("rest", [{"dense_layers": [3]}, {"layers": {"3": []}}])
def test_layers_that_the_model_has_not(rest: dict) -> None:
    with pytest.raises(ValueError, match="there is no layer 3, the last one is 2"):
        try_maskers(text(*BEHIND, **rest), SHAPE)


@dataclass(frozen=True)
class ParticularConfig(MaskerConfig):
    """Of a user's: a size of its own kind, and what `dataclasses.replace` cannot copy."""

    heavy_size: float
    scale: InitVar[int] = 1

    def __post_init__(self, scale: int) -> None:
        if not isinstance(self.heavy_size, float):
            raise ValueError(f"heavy_size must be a float, got {self.heavy_size!r}")


class Particular(ResearchMasker):
    """Of a user's: of use behind others only, and not in the last layer."""

    layers_seen: list[int]

    def add_mask(self, *, previous_mask: Any, layer_idx: int, **rest: Any) -> Any:
        if previous_mask.is_empty_mask() or previous_mask.is_full_mask():
            raise ValueError("needs some keys selected, and some not")
        type(self).layers_seen.append(layer_idx)
        if layer_idx == 2:
            raise ValueError("not in the last layer")
        return previous_mask

    @classmethod
    def create_from_config(cls, config: MaskerConfig) -> "Particular":
        return cls(require_config(config, ParticularConfig))


@pytest.fixture
def particular(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    for name in ("_maskers", "_names"):
        monkeypatch.setattr(MaskerRegistry, name, dict(getattr(MaskerRegistry, name)))
    MaskerRegistry.register(ParticularConfig)(Particular)
    monkeypatch.setattr(Particular, "layers_seen", [], raising=False)
    return {"type": "particular", "heavy_size": 0.25}


def test_a_masker_of_a_users_own_is_tried_as_it_is_and_behind_those_before_it(
    particular: dict[str, Any],
) -> None:
    """In each layer, since only the user knows what it does there."""
    try_maskers(text(*BEHIND, particular, dense_layers=[2]), SHAPE)
    assert set(Particular.layers_seen) == {0, 1}
    with pytest.raises(ValueError, match="on this model: layer 2: not in the last layer"):
        try_maskers(text(*BEHIND, particular), SHAPE)


def test_what_is_costly_is_tried_with_little_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []

    def counted(cache: dict, seed: int, layer: int, shape: tuple[int, int, int]) -> Any:
        shapes.append(shape)
        return original(cache, seed, layer, shape)

    original = magic_pig.projections_of_layer
    monkeypatch.setattr(magic_pig, "projections_of_layer", counted)
    masker = {"type": "magic_pig", "lsh_l": 1024, "lsh_k": 8}
    many = trial.AttentionShape(num_layers=64, num_heads=4, num_kv_heads=2, head_size=16)
    try_maskers(text(masker), many)
    assert 0 < len(shapes) <= 4
    assert max(shape[-1] for shape in shapes) <= 8
