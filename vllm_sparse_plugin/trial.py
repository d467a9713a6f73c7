"""Tries maskers on a model's shapes before they meet a batch.

What only the model can tell (a masker's channels, networks or sub-vectors do not fit its heads)
would otherwise show up in the middle of a step and take the whole engine down.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
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
from sparse_attention_hub.sparse_attention.serialization import config_from_json
from vllm_sparse_plugin.masked_attention import attend_row, attention_of

_NUM_KEYS = 64
_SMALL_FIELDS: dict[str, Any] = {
    "heavy_size": 1,
    "sink_size": 1,
    "window_size": 1,
    "page_size": 4,
    "init_offset": 0,
    "local_offset": 0,
    "pq_bits": 1,
    "kmeans_iterations": 1,
    "lsh_l": 2,
    "lsh_k": 4,
    "L": 1,
    "K": 4,
}
"""With which this project's maskers leave keys to the ones behind them, and take little time."""
_OWN_PACKAGE = "sparse_attention_hub."


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
    """Runs every layer's maskers on a few random keys: together, and this project's one by one too.

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
    tried: dict[str, ResearchAttention] = {}
    where = "they"
    try:
        whole = attention_of(config_json)
        with torch.inference_mode():
            for layer in range(shape.num_layers):
                maskers = [masker.config for masker in whole.maskers_of_layer(layer)]
                for called, some in _lists(maskers) if maskers else ():
                    where = f"layer {layer}{called}"
                    name = repr(some)
                    if name not in tried:
                        tried[name] = _attention(some)
                    elif not any(map(_differs_by_layer, some)):
                        continue
                    trial.run(tried[name], layer)
    except Exception as error:  # a masker of the user's own may raise anything
        raise ValueError(f"maskers do not run on this model: {where}: {error}") from error


def _lists(maskers: Sequence[MaskerConfig]) -> Iterator[tuple[str, tuple[MaskerConfig, ...]]]:
    """What is tried of a layer's maskers, and what it is called in errors.

    A masker of the user's own may need those before it, and sizes of which only the user knows.
    """
    small = [_small(masker) if _is_own(masker) else masker for masker in maskers]
    for masker in small:
        if _is_own(masker):
            yield f", {json_name(type(masker))}", (masker,)
    yield "", tuple(small)


def _small(masker: MaskerConfig) -> MaskerConfig:
    names = {field.name for field in dataclasses.fields(masker)} & set(_SMALL_FIELDS)
    return dataclasses.replace(masker, **{name: _SMALL_FIELDS[name] for name in names})


def _is_own(masker: MaskerConfig) -> bool:
    return type(masker).__module__.startswith(_OWN_PACKAGE)


def _differs_by_layer(masker: MaskerConfig) -> bool:
    """Whether it reads something else in each layer, or may do so."""
    names_file = any(name.endswith("_file") and value for name, value in vars(masker).items())
    return names_file or not _is_own(masker)


def _attention(maskers: Sequence[MaskerConfig]) -> ResearchAttention:
    return ResearchAttention.create_from_config(ResearchAttentionConfig(list(maskers)))


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

    def run(self, attention: ResearchAttention, layer: int) -> None:
        for query in (self.query[:1], self.query):
            attend_row(attention, query, self.key, self.key, query.shape[-1] ** -0.5, layer)
