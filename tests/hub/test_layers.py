"""Choices by layer: dense layers, and layers with maskers of their own."""

import torch

from sparse_attention_hub.sparse_attention import (
    LocalMaskerConfig,
    ResearchAttention,
    ResearchAttentionConfig,
    SinkMaskerConfig,
)
from sparse_attention_hub.sparse_attention.serialization import (
    config_fingerprint,
    config_from_json,
    config_to_dict,
    config_to_json,
)
from tests.hub.top_k_maskers import tensors

SINK, LOCAL = SinkMaskerConfig(3), LocalMaskerConfig(5)
CONFIG = ResearchAttentionConfig([SINK], dense_layers=(2, 0), layer_masker_configs={4: [LOCAL]})


def test_each_layer_reads_what_it_is_told() -> None:
    attention = ResearchAttention.create_from_config(CONFIG)
    inputs = (*tensors(1, 2, 1, 1, 20), None, 1.0, 0.0)
    read = {
        layer: attention.select(*inputs, {}, layer_idx=layer).get_dense_mask()[0, 0, 0]
        for layer in range(5)
    }
    assert [int(read[layer].sum()) for layer in range(5)] == [20, 3, 20, 3, 5]
    assert torch.equal(read[4].nonzero().flatten(), torch.arange(15, 20))


def test_json_and_fingerprint() -> None:
    assert config_from_json(config_to_json(CONFIG)) == CONFIG
    data = config_to_dict(CONFIG)
    assert data["dense_layers"] == [0, 2]
    assert list(data["layers"]) == ["4"]
    plain = ResearchAttentionConfig([SINK])
    assert set(config_to_dict(plain)) == {"maskers"}
    others = [plain, ResearchAttentionConfig([SINK], (0,)), CONFIG]
    assert len({config_fingerprint(config) for config in others}) == 3
    assert len(set(others)) == 3


def test_dense_or_not() -> None:
    assert ResearchAttentionConfig([]).is_dense
    assert ResearchAttentionConfig([], (1,), {3: []}).is_dense
    assert not ResearchAttentionConfig([], (), {3: [SINK]}).is_dense
    assert CONFIG.all_masker_configs() == [SINK, LOCAL]
