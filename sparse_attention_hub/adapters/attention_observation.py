"""Looking at what a model's attention layers get, and what maskers would make of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from sparse_attention_hub.adapters.dense_attention import dense_attention
from sparse_attention_hub.sparse_attention.research_attention import (
    ResearchAttention,
    ResearchAttentionConfig,
)
from sparse_attention_hub.sparse_attention.utils.mask_attention_utils import (
    get_masked_attention_output,
    get_true_attention_output,
)

_ATTENTION = "sparse_attention_hub_observed"


@dataclass(frozen=True)
class LayerInputs:
    """What one attention layer got, rotated.

    Attributes:
        layer: Its index.
        query: `(B, H, Q, D)`.
        key: `(B, G, K, D)`.
        value: `(B, G, K, Dv)`.
        scaling: Of the scores.
        sink_logits: `(H,)`, of learned attention sinks; None = the layer has none.
    """

    layer: int
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    scaling: float
    sink_logits: torch.Tensor | None = None


@contextmanager
def observed_attention(
    model: PreTrainedModel, observe: Callable[[LayerInputs], None]
) -> Iterator[None]:
    """Calls `observe` for every attention layer that runs in the `with` block, densely.

    Raises:
        ValueError: The model does not take its attention from transformers' registry, or its
            attention modules have no `layer_idx`.
    """

    def attend(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> Any:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        layer = getattr(module, "layer_idx", None)
        if layer is None:
            raise ValueError(f"{type(module).__name__} has no layer_idx to tell its layers apart")
        observe(LayerInputs(layer, query, key, value, scale, kwargs.get("s_aux")))
        return dense_attention(module, query, key, value, attention_mask, scaling, **kwargs), None

    AttentionInterface.register(_ATTENTION, attend)
    AttentionMaskInterface.register(_ATTENTION, sdpa_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation(_ATTENTION)
    try:
        if model.config._attn_implementation != _ATTENTION:
            raise ValueError(f"{type(model).__name__} does not support a custom attention function")
        yield
    finally:
        model.set_attn_implementation(before)


def decode_step_inputs(model: PreTrainedModel, token_ids: Sequence[int]) -> list[LayerInputs]:
    """What each layer gets when the last token is decoded after the others, all densely."""
    inputs: list[LayerInputs] = []

    def keep(layer: LayerInputs) -> None:
        last = layer.query[:, :, -1:].clone()
        inputs.append(replace(layer, query=last))

    with observed_attention(model, keep), torch.inference_mode():
        ids = torch.tensor([list(token_ids)], device=model.device)
        model(input_ids=ids, use_cache=False, logits_to_keep=1)
    return inputs


@dataclass(frozen=True)
class LayerReading:
    """What maskers read of one layer in one step, and what that costs.

    Attributes:
        layer: Its index.
        density: Share of the keys that is read, `(H,)`.
        error: `|sparse - dense| / |dense|` of the output, `(H,)`.
        keys_read: The weight of each key, 0 = not read, `(H, K)`.
    """

    layer: int
    density: torch.Tensor
    error: torch.Tensor
    keys_read: torch.Tensor


def read_layers(
    config: ResearchAttentionConfig, inputs: Sequence[LayerInputs]
) -> list[LayerReading]:
    """Runs maskers on the inputs of `decode_step_inputs`, of one sequence.

    Each layer gets what a dense model gives it: errors of earlier layers do not add up.
    """
    attention = ResearchAttention.create_from_config(config)
    readings = []
    with torch.inference_mode():
        for layer in inputs:
            tensors = (layer.query, layer.key, layer.value, None, layer.scaling, 0.0)
            mask = attention.select(*tensors, {}, layer_idx=layer.layer)
            sinks = layer.sink_logits
            sparse = get_masked_attention_output(None, *tensors, mask, sink_logits=sinks)
            dense = get_true_attention_output(None, *tensors, sinks)[0]
            sparse, dense = sparse[0, 0].float(), dense[0, 0].float()
            weights = mask.get_dense_mask()[0, :, 0]
            readings.append(
                LayerReading(
                    layer.layer,
                    (weights > 0).float().mean(dim=-1),
                    (sparse - dense).norm(dim=-1) / dense.norm(dim=-1),
                    weights,
                )
            )
    return readings
