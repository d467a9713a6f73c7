"""Every top-k masker that ranks by labels, with weights and channels for a few small layers."""

import json
from pathlib import Path

import torch

from sparse_attention_hub.sparse_attention.research_attention.maskers.fixed import (
    DoubleSparsityTopKMaskerConfig,
    HashAttentionTopKMaskerConfig,
    OracleTopKConfig,
    PQCacheConfig,
    QuestTopKMaskerConfig,
    SocketMaskerConfig,
)

HEAD_SIZE = 16
LAYERS = 3


def channel_file(folder: Path, heads: int) -> str:
    """Different channel orders for every layer and head."""
    generator = torch.Generator().manual_seed(heads)
    data = {
        f"model.layers.{layer}.self_attn.{projection}": [
            torch.randperm(HEAD_SIZE, generator=generator).tolist() for _ in range(heads)
        ]
        for layer in range(LAYERS)
        for projection in ("qk_proj", "q_proj", "k_proj")
    }
    path = folder / f"channels-{heads}.json"
    path.write_text(json.dumps(data))
    return str(path)


def hash_weights(heads: int, bits: int = 40, hidden: int = 24):
    """Random networks of two linear layers, different for every layer and head."""
    generator = torch.Generator().manual_seed(heads)

    def parts(side: str) -> dict:
        sizes = [(HEAD_SIZE, hidden), (hidden, bits)]
        return {
            f"{side}_matrix": [torch.randn(heads, *size, generator=generator) for size in sizes],
            f"{side}_bias": [torch.randn(heads, size[1], generator=generator) for size in sizes],
        }

    return {layer: {**parts("query"), **parts("key")} for layer in range(LAYERS)}


def top_k_configs(folder: Path, heads: int, heavy_size, head_granularity: str = "query_head"):
    """One configuration per masker, by name."""
    common = {"heavy_size": heavy_size, "head_granularity": head_granularity}
    return {
        "oracle": OracleTopKConfig(**common),
        "quest": QuestTopKMaskerConfig(page_size=4, label_bits=4, **common),
        "double sparsity": DoubleSparsityTopKMaskerConfig(
            sorted_channel_file=channel_file(folder, heads), group_factor=4, **common
        ),
        "hash": HashAttentionTopKMaskerConfig(
            hat_bits=40,
            hat_mlp_layers=2,
            hat_mlp_hidden_size=24,
            hat_mlp_activation="silu",
            hat_weights=hash_weights(heads),
            **common,
        ),
        "pq": PQCacheConfig(pq_sub_dim=4, pq_bits=3, **common),
        "socket": SocketMaskerConfig(K=3, L=20, tau=0.4, **common),
    }


NAMES = ("oracle", "quest", "double sparsity", "hash", "pq", "socket")


def tensors(batch: int, heads: int, kv_heads: int, queries: int, keys: int, seed: int = 0):
    """Query, key and value."""
    generator = torch.Generator().manual_seed(seed)

    def make(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, HEAD_SIZE, generator=generator)

    return make(batch, heads, queries), make(batch, kv_heads, keys), make(batch, kv_heads, keys)
