"""Dense attention of layers with learned sinks, against transformers' own function for them."""

import pytest
import torch
from transformers import GptOssConfig
from transformers.models.gpt_oss import modeling_gpt_oss

from sparse_attention_hub.adapters import dense_attention as home
from sparse_attention_hub.adapters.dense_attention import dense_attention
from tests.tolerances import ATTENTION_ATOL

HEADS, KV_HEADS, HEAD_SIZE = 4, 2, 16


@pytest.fixture
def layer() -> torch.nn.Module:
    config = GptOssConfig(
        hidden_size=64,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_SIZE,
        num_hidden_layers=1,
        layer_types=["full_attention"],
    )
    layer = modeling_gpt_oss.GptOssAttention(config, 0).eval()
    with torch.no_grad():
        layer.sinks.copy_(torch.linspace(-2, 4, HEADS))
    return layer


def tensors(queries: int, keys: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(queries * 100 + keys)
    heads = ((HEADS, queries), (KV_HEADS, keys), (KV_HEADS, keys))
    return tuple(torch.randn(2, *shape, HEAD_SIZE, generator=generator) for shape in heads)


@pytest.mark.parametrize("at_once", [1 << 26, 2 * HEADS * 40 * 3])
@pytest.mark.parametrize(("queries", "kind"), [(1, "none"), (40, "none"), (7, "additive")])
def test_against_transformers(layer, queries, kind, at_once, monkeypatch) -> None:
    """A decode step, a prompt, and a later chunk whose mask hides some keys, too."""
    monkeypatch.setattr(home, "MAX_SCORES", at_once)
    query, key, value = tensors(queries, 40)
    position = torch.arange(40)
    visible = position[None] <= position[-queries:, None]
    if kind == "additive":
        visible = visible & (position > 5)  # padding, or what a window leaves
    mask = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo().min)[None, None]
    expected, _ = modeling_gpt_oss.eager_attention_forward(layer, query, key, value, mask, 0.25)
    given = mask if kind == "additive" else None
    with torch.no_grad():
        found = dense_attention(layer, query, key, value, given, 0.25, s_aux=layer.sinks)
    assert (found - expected).abs().max() <= ATTENTION_ATOL[torch.float32]


def test_a_layer_that_is_not_causal(layer) -> None:
    """Said by itself, or by who calls; and its scores are scaled as torch does it by default."""
    query, key, value = tensors(7, 7)
    arguments = (layer, query, key, value, None)
    expected, _ = modeling_gpt_oss.eager_attention_forward(*arguments, HEAD_SIZE**-0.5)
    with torch.no_grad():
        by_caller = dense_attention(*arguments, s_aux=layer.sinks, is_causal=False)
        layer.is_causal = False
        by_itself = dense_attention(*arguments, s_aux=layer.sinks)
    for found in (by_caller, by_itself):
        assert (found - expected).abs().max() <= ATTENTION_ATOL[torch.float32]


def test_dropout_in_training_only(layer) -> None:
    arguments = (layer, *tensors(7, 7), None, 0.25)
    with torch.no_grad():
        plain = dense_attention(*arguments, 0.0, s_aux=layer.sinks)
        assert torch.equal(dense_attention(*arguments, 0.5, s_aux=layer.sinks), plain)
        layer.train()
        assert not torch.equal(dense_attention(*arguments, 0.5, s_aux=layer.sinks), plain)


def test_without_sinks_it_is_torchs(layer) -> None:
    query, key, value = tensors(40, 40)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, enable_gqa=True
    )
    found = dense_attention(layer, query, key, value, None)
    assert torch.equal(found, expected.transpose(1, 2))
