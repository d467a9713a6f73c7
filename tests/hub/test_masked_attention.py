"""Attention under a mask, against a float64 loop over rows and heads."""

import math

import pytest
import torch

from sparse_attention_hub.sparse_attention.utils.kv_utils import (
    _get_num_key_value_groups,
    grouped_scores,
    grouped_sum,
    repeat_kv,
)
from sparse_attention_hub.sparse_attention.utils.mask import Mask
from sparse_attention_hub.sparse_attention.utils.mask_attention_utils import (
    get_attention_denominator,
    get_attention_numerator,
    get_masked_attention_output,
    get_true_attention_output,
)
from tests.tolerances import ATTENTION_ATOL

SHAPES = [(1, 4, 4, 1, 1), (2, 4, 4, 3, 7), (1, 6, 2, 5, 9), (1, 3, 1, 2, 33)]


def tensors(batch, heads, kv_heads, queries, keys, dtype=torch.float32):
    generator = torch.Generator().manual_seed(heads * 1000 + keys)

    def make(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    return (
        make(batch, heads, queries, 16),
        make(batch, kv_heads, keys, 16),
        make(batch, kv_heads, keys, 8),
        (torch.rand(batch, heads, queries, keys, generator=generator) * 1.5).clamp(max=1.0)
        * (torch.rand(batch, heads, queries, keys, generator=generator) > 0.4),
    )


def causal(queries: int, keys: int, kind: str) -> torch.Tensor | None:
    allowed = torch.arange(keys) <= torch.arange(keys - queries, keys)[:, None]
    if kind == "none":
        return None
    if kind == "boolean":
        return allowed[None, None]
    lowest = -math.inf if kind == "infinite" else torch.finfo(torch.float32).min
    return torch.zeros(queries, keys).masked_fill(~allowed, lowest)[None, None]


def loop(query, key, value, weights, mask, scaling, sinks=None):
    """`sum exp(s)/p v / sum exp(s)/p`, one row at a time, from its definition.

    Learned sinks are one more logit of each row, whose value is nothing.
    """
    batch, heads, queries, _ = query.shape
    group = heads // key.shape[1]
    output = torch.zeros(batch, queries, heads, value.shape[-1], dtype=torch.float64)
    probabilities = torch.zeros(weights.shape, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            for q in range(queries):
                chosen = [k for k, w in enumerate(weights[b, h, q].tolist()) if w > 0]
                if mask is not None and mask.dtype == torch.bool:
                    chosen = [k for k in chosen if mask[0, 0, q, k]]
                elif mask is not None:
                    chosen = [k for k in chosen if mask[0, 0, q, k] > -1e30]
                if not chosen:
                    continue
                scores = key[b, h // group, chosen].double() @ query[b, h, q].double() * scaling
                logits = scores - weights[b, h, q, chosen].double().log()
                if sinks is not None:
                    logits = torch.cat([logits, sinks[h : h + 1].double()])
                part = torch.softmax(logits, 0)[: len(chosen)]
                probabilities[b, h, q, chosen] = part
                output[b, q, h] = part @ value[b, h // group, chosen].double()
    return output, probabilities


@pytest.mark.parametrize("kind", ["none", "additive", "infinite", "boolean"])
@pytest.mark.parametrize("shape", SHAPES)
def test_against_float64_loop(shape, kind: str) -> None:
    query, key, value, weights = tensors(*shape)
    mask = causal(shape[3], shape[4], kind)
    expected, probabilities = loop(query, key, value, weights, mask, 0.25)
    sparse = Mask.create_mask_from_dense_mask(tuple(weights.shape), weights, torch.float32)
    arguments = {"attention_mask": mask, "scaling": 0.25, "dropout": 0.0}
    output, found = get_masked_attention_output(
        None,
        query,
        key,
        value,
        **arguments,
        sparse_attention_mask=sparse,
        return_attention_weights=True,
    )
    atol = ATTENTION_ATOL[torch.float32]
    assert (output.double() - expected).abs().max() <= atol
    assert (found.double() - probabilities).abs().max() <= atol
    assert output.is_contiguous()
    numerator = get_attention_numerator(
        None, query, key, value, **arguments, sparse_attention_mask=sparse
    )
    denominator = get_attention_denominator(
        None, query, key, **arguments, sparse_attention_mask=sparse
    )
    quotient = (numerator / denominator.clamp(min=1e-30)).transpose(1, 2)
    assert (quotient.double() - expected).abs().max() <= atol


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_half_precision(shape, dtype: torch.dtype) -> None:
    query, key, value, weights = tensors(*shape, dtype=dtype)
    expected, _ = loop(query, key, value, weights.to(dtype), None, 0.25)
    sparse = Mask.create_mask_from_dense_mask(tuple(weights.shape), weights.to(dtype), dtype)
    output = get_masked_attention_output(None, query, key, value, None, 0.25, 0.0, sparse)
    assert output.dtype == dtype
    assert (output.double() - expected).abs().max() <= ATTENTION_ATOL[dtype]


@pytest.mark.parametrize("kind", ["none", "additive", "boolean"])
@pytest.mark.parametrize("shape", SHAPES)
def test_dense_is_torch_sdpa(shape, kind: str) -> None:
    query, key, value, _ = tensors(*shape)
    mask = causal(shape[3], shape[4], kind)
    output, weights = get_true_attention_output(None, query, key, value, mask, 0.25, 0.0)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=0.25, enable_gqa=True
    ).transpose(1, 2)
    atol = ATTENTION_ATOL[torch.float32]
    assert (output - expected).abs().max() <= atol
    assert (weights.sum(-1) - 1).abs().max() <= atol


@pytest.mark.parametrize("kind", ["none", "additive", "boolean"])
@pytest.mark.parametrize("shape", SHAPES)
def test_learned_sinks(shape, kind: str) -> None:
    """About as large as scores, and far below and above them; of no weight where all is -inf."""
    query, key, value, weights = tensors(*shape)
    mask = causal(shape[3], shape[4], kind)
    sparse = Mask.create_mask_from_dense_mask(tuple(weights.shape), weights, torch.float32)
    arguments = {"attention_mask": mask, "scaling": 0.25, "dropout": 0.0}
    atol = ATTENTION_ATOL[torch.float32]
    plain = get_masked_attention_output(
        None, query, key, value, **arguments, sparse_attention_mask=sparse
    )
    for offset in (0.0, -200.0, 200.0, -math.inf):
        sinks = torch.linspace(-1, 2, shape[1]) + offset
        wanted, probabilities = loop(query, key, value, weights, mask, 0.25, sinks)
        output, found = get_masked_attention_output(
            None,
            query,
            key,
            value,
            **arguments,
            sparse_attention_mask=sparse,
            return_attention_weights=True,
            sink_logits=sinks,
        )
        assert (output.double() - wanted).abs().max() <= atol
        assert (found.double() - probabilities).abs().max() <= atol
        if offset == 0:
            assert (output - plain).abs().max() > 100 * atol
            inputs = {"sparse_attention_mask": sparse, "sink_logits": sinks, **arguments}
            denominator = get_attention_denominator(None, query, key, **inputs)
            quotient = get_attention_numerator(None, query, key, value, **inputs) / denominator
            assert (quotient.transpose(1, 2).double() - wanted).abs().max() <= atol
            full = torch.ones_like(weights)
            dense, _ = get_true_attention_output(None, query, key, value, mask, 0.25, 0.0, sinks)
            wanted, _ = loop(query, key, value, full, mask, 0.25, sinks)
            assert (dense.double() - wanted).abs().max() <= atol


def test_selected_keys_far_below_the_largest_score_do_not_underflow() -> None:
    query = torch.ones(1, 1, 1, 1)
    key = torch.tensor([1000.0, 0.0, 1.0]).view(1, 1, 3, 1)
    value = torch.tensor([[7.0], [1.0], [3.0]]).view(1, 1, 3, 1)
    weights = torch.tensor([0.0, 1.0, 1.0]).view(1, 1, 1, 3)
    mask = Mask.create_mask_from_dense_mask((1, 1, 1, 3), weights, torch.float32)
    output = get_masked_attention_output(None, query, key, value, None, 1.0, 0.0, mask)
    expected = (1 + 3 * math.e) / (1 + math.e)
    assert abs(float(output) - expected) <= ATTENTION_ATOL[torch.float32]


@pytest.mark.parametrize("invisible", [False, True])
def test_row_that_selects_nothing_gives_zeros(invisible: bool) -> None:
    query, key, value, weights = tensors(1, 2, 1, 2, 5)
    attention_mask = None
    if invisible:  # selected, but nothing of it may be seen
        weights.fill_(1)
        attention_mask = torch.ones(1, 1, 2, 5, dtype=torch.bool)
        attention_mask[..., 0, :] = False
    else:
        weights.fill_(1)[:, :, 0] = 0
    mask = Mask.create_mask_from_dense_mask((1, 2, 2, 5), weights, torch.float32)
    output, found = get_masked_attention_output(
        None, query, key, value, attention_mask, 1.0, 0.0, mask, True
    )
    assert not output[:, 0].any()
    assert not found[:, :, 0].any()
    assert output[:, 1].abs().sum() > 0
    nothing = Mask.create_empty_mask((1, 2, 2, 5), torch.float32, query.device)
    assert not get_masked_attention_output(None, query, key, value, None, 1.0, 0.0, nothing).any()


def test_dropout_in_training_only() -> None:
    query, key, value, _ = tensors(1, 2, 1, 2, 50)
    full = Mask.create_full_mask((1, 2, 2, 50), torch.float32, query.device)
    module = torch.nn.Identity()
    arguments = (query, key, value, None, 1.0, 0.5, full)
    plain = get_masked_attention_output(None, *arguments)
    assert torch.equal(get_masked_attention_output(module.eval(), *arguments), plain)
    assert not torch.equal(get_masked_attention_output(module.train(), *arguments), plain)


def test_dropout_comes_after_the_softmax() -> None:
    """So that a weight is its dense value over 1 - p, or nothing."""
    query, key, value, _ = tensors(1, 2, 1, 2, 50)
    module = torch.nn.Identity().train()
    inputs = (query, key, value, None, 1.0)
    plain = get_true_attention_output(None, *inputs, 0.5)[1]
    output, weights = get_true_attention_output(module, *inputs, 0.5)
    kept = weights > 0
    assert 0.2 < kept.float().mean() < 0.8
    torch.testing.assert_close(weights[kept], 2 * plain[kept])
    expected = grouped_sum(weights, value).transpose(1, 2)
    torch.testing.assert_close(output, expected, atol=1e-6, rtol=1e-5)


def test_numerator_and_denominator_give_the_output_in_training_too() -> None:
    query, key, value, weights = tensors(1, 2, 1, 2, 50)
    mask = Mask.create_mask_from_dense_mask(weights.shape, weights, torch.float32)
    module = torch.nn.Identity().train()
    for dropout in (0.0, 0.5):
        arguments = (None, 1.0, dropout, mask)
        torch.manual_seed(0)
        numerator = get_attention_numerator(module, query, key, value, *arguments)
        denominator = get_attention_denominator(module, query, key, *arguments)
        torch.manual_seed(0)
        output = get_masked_attention_output(module, query, key, value, *arguments)
        expected = (numerator / denominator).transpose(1, 2)
        torch.testing.assert_close(output, expected, atol=1e-6, rtol=1e-5)


def test_grouped_products_are_products_with_repeated_heads() -> None:
    query, key, value, weights = tensors(2, 6, 2, 3, 7)
    atol = ATTENTION_ATOL[torch.float32]
    repeated = repeat_kv(key, 3)
    assert (grouped_scores(query, key) - query @ repeated.transpose(2, 3)).abs().max() <= atol
    assert (grouped_sum(weights, value) - weights @ repeat_kv(value, 3)).abs().max() <= atol
    assert repeat_kv(key, 1) is key
    with pytest.raises(ValueError, match="6 query heads.*4 KV heads"):
        _get_num_key_value_groups(query, torch.zeros(2, 4, 7, 16))
