"""What an in-process adapter says of layers that stay dense, or were named in vain."""

from types import SimpleNamespace

import pytest

from sparse_attention_hub.adapters.sparse_layers import say_what_stays_dense
from sparse_attention_hub.sparse_attention import (
    LocalMaskerConfig,
    ResearchAttentionConfig,
    SinkMaskerConfig,
    SparseAttention,
)

SINK = [SinkMaskerConfig(2)]
KINDS = ["full_attention", "linear_attention", "sliding_attention", "full_attention"]


def said(caplog: pytest.LogCaptureFixture, named: dict, **model) -> list[str]:
    caplog.clear()
    config = ResearchAttentionConfig(SINK, **named)
    fields = {"num_hidden_layers": 4, "max_position_embeddings": 64, **model}
    attention = SparseAttention.create_from_config(config)
    say_what_stays_dense(SimpleNamespace(**fields), attention)
    return [record.getMessage() for record in caplog.records]


def test_windows(caplog: pytest.LogCaptureFixture) -> None:
    mixed = {"layer_types": KINDS, "sliding_window": 16}
    [message] = said(caplog, {}, **mixed)
    assert message == "sparse attention: 1 of 4 layers have a sliding window and stay dense"
    [message] = said(caplog, {}, sliding_window=16)
    assert message.startswith("sparse attention: 4 of 4 layers")
    # A window as long as the model hides nothing.
    assert said(caplog, {}, **{**mixed, "sliding_window": 64}) == []
    assert said(caplog, {}) == []


@pytest.mark.parametrize(
    ("named", "layers"),
    [
        ({"layer_masker_configs": {0: [LocalMaskerConfig(3)]}, "dense_layers": [2, 3]}, None),
        ({"layer_masker_configs": {2: SINK, 1: SINK, 3: SINK}}, "1, 2"),
        ({"dense_layers": [0, 1, 4]}, "1, 4"),
    ],
)
def test_layers_that_are_named_in_vain(caplog, named: dict, layers: str | None) -> None:
    """Sparse where there is a window or no attention; dense where there is no attention."""
    messages = said(caplog, named, layer_types=KINDS, sliding_window=16)
    assert len(messages) == 1 + (layers is not None)
    if layers is not None:
        assert f"says something of layers {layers}, and changes nothing there" in messages[1]
        assert messages[1].endswith("attention can be sparse in layers 0, 3")
