"""Tries maskers on a model's shapes before they meet a batch.

What only the model can tell (a masker's channels, networks or sub-vectors do not fit its heads)
would otherwise show up in the middle of a step and take the whole engine down.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import torch

from sparse_attention_hub.sparse_attention.research_attention import (
    ResearchAttention,
    ResearchAttentionConfig,
)
from sparse_attention_hub.sparse_attention.research_attention.maskers.base import (
    MaskerConfig,
    json_name,
)
from sparse_attention_hub.sparse_attention.serialization import config_from_json, config_to_json
from vllm_sparse_plugin.masked_attention import attend_row, attention_of

_NUM_KEYS = 8
_SMALL_SIZES: dict[str, Any] = {
    "heavy_size": 1,
    "sink_size": 1,
    "window_size": 1,
    "init_offset": 0,
    "local_offset": 0,
}
"""With which a masker does not select all of a few keys, and has to do what it does for many."""


@dataclass(frozen=True)
class AttentionShape:
    """Of a model's attention layers, on one device.

    Attributes:
        num_layers: Of the model.
        num_heads: Query heads.
        num_kv_heads: KV heads.
        head_size: Channels of a head.
    """

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int


@functools.lru_cache(maxsize=1024)
def try_maskers(config_json: str, shape: AttentionShape) -> None:
    """Runs every layer's maskers on a few random keys: together, and each by itself.

    Args:
        config_json: The maskers.
        shape: Of the model.

    Raises:
        ValueError: The maskers cannot be made, or fail, or are for layers that the model has not;
            says in which layer, and how.
    """
    config = config_from_json(config_json)
    for layer in (*config.dense_layers, *config.layer_masker_configs):
        if layer >= shape.num_layers:
            raise ValueError(
                f"maskers do not fit this model: there is no layer {layer}, the last one is "
                f"{shape.num_layers - 1}"
            )
    trial = _Trial.of(shape)
    where = "they"
    try:
        whole = attention_of(config_json)
        alone = {
            repr(masker): attention_of(config_to_json(_small(masker)))
            for masker in config.all_masker_configs()
        }
        with torch.inference_mode():
            for layer in range(shape.num_layers):
                where = f"layer {layer}"
                trial.run(whole, layer, num_queries=1)
                trial.run(whole, layer, num_queries=2)
                if layer in config.dense_layers:
                    continue
                for masker in config.layer_masker_configs.get(layer, config.masker_configs):
                    where = f"layer {layer}, {json_name(type(masker))}"
                    name = repr(masker)
                    if name in alone:
                        trial.run(alone[name], layer, num_queries=1)
                        if not _has_file(masker):  # and so something of its own in each layer
                            del alone[name]
    except Exception as error:  # a masker of the user's own may raise anything
        raise ValueError(f"maskers do not run on this model: {where}: {error}") from error


def _small(masker: MaskerConfig) -> ResearchAttentionConfig:
    """The masker alone, with sizes at which it cannot return early."""
    names = {field.name for field in dataclasses.fields(masker)} & set(_SMALL_SIZES)
    sizes = {name: _SMALL_SIZES[name] for name in names}
    return ResearchAttentionConfig([dataclasses.replace(masker, **sizes)])


def _has_file(masker: MaskerConfig) -> bool:
    return any(name.endswith("_file") and value for name, value in vars(masker).items())


@dataclass(frozen=True)
class _Trial:
    """A few keys and queries."""

    query: torch.Tensor
    key: torch.Tensor

    @classmethod
    def of(cls, shape: AttentionShape) -> _Trial:
        random = torch.Generator().manual_seed(0)
        return cls(
            torch.randn(2, shape.num_heads, shape.head_size, generator=random),
            torch.randn(1, shape.num_kv_heads, _NUM_KEYS, shape.head_size, generator=random),
        )

    def run(self, attention: ResearchAttention, layer: int, num_queries: int) -> None:
        query = self.query[:num_queries]
        scaling = query.shape[-1] ** -0.5
        attend_row(attention, query, self.key, self.key, scaling, layer)
