"""Tries maskers on a model's shapes before they meet a batch.

What only the model can tell (a masker's channels, networks or sub-vectors do not fit its heads)
would otherwise show up in the middle of a step and take the whole engine down.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from vllm_sparse_plugin.masked_attention import attend_row, attention_of


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
    """Runs every layer's maskers on a few random keys: one query, and two.

    Args:
        config_json: The maskers.
        shape: Of the model.

    Raises:
        ValueError: The maskers cannot be made, or fail; says in which layer, and how.
    """
    generator = torch.Generator().manual_seed(0)
    key = torch.randn(1, shape.num_kv_heads, 8, shape.head_size, generator=generator)
    query = torch.randn(2, shape.num_heads, shape.head_size, generator=generator)
    where = "they"
    try:
        attention = attention_of(config_json)
        with torch.inference_mode():
            for layer in range(shape.num_layers):
                where = f"layer {layer}"
                for queries in (query[:1], query):
                    attend_row(attention, queries, key, key, shape.head_size**-0.5, layer)
    except Exception as error:  # a masker of the user's own may raise anything
        raise ValueError(f"maskers do not run on this model: {where}: {error}") from error
