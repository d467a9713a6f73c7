"""Maskers that do not fit the model are found before they run in a step."""

import pytest

from sparse_attention_hub.sparse_attention.serialization import config_from_dict, config_to_json
from vllm_sparse_plugin.trial import AttentionShape, try_maskers

SHAPE = AttentionShape(num_layers=3, num_heads=4, num_kv_heads=2, head_size=16)


def text(*maskers: dict, **rest) -> str:
    return config_to_json(config_from_dict({"maskers": list(maskers), **rest}))


def test_maskers_that_fit_pass() -> None:
    pq = {"type": "pq_cache", "heavy_size": 2, "pq_sub_dim": 4, "pq_bits": 2}
    try_maskers(text({"type": "sink", "sink_size": 1}, pq), SHAPE)


def test_a_misfit_names_its_layer() -> None:
    pq = {"type": "pq_cache", "heavy_size": 2, "pq_sub_dim": 5, "pq_bits": 2}
    with pytest.raises(ValueError, match=r"layer 0: pq_sub_dim must divide the head size 16"):
        try_maskers(text(pq), SHAPE)
    with pytest.raises(ValueError, match=r"layer 2: pq_sub_dim must divide the head size 16"):
        try_maskers(text(layers={"2": [pq]}), SHAPE)


def test_files_are_read_before_the_first_step(tmp_path) -> None:
    path = tmp_path / "channels.json"
    path.write_text("{}")
    masker = {"type": "double_sparsity_top_k", "heavy_size": 2, "sorted_channel_file": str(path)}
    with pytest.raises(ValueError, match="no entry 'model.layers.0"):
        try_maskers(text(masker), SHAPE)
