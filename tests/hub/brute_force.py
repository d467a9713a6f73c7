"""The maskers by their definitions: sets of key positions, one query at a time."""

import torch

from sparse_attention_hub.sparse_attention import ResearchAttentionConfig
from sparse_attention_hub.sparse_attention.serialization import config_to_dict


def selections(
    config: ResearchAttentionConfig,
    query: torch.Tensor,
    key: torch.Tensor,
    visible: torch.Tensor,
) -> torch.Tensor:
    """What is selected.

    Args:
        config: Sink, local and oracle top-k maskers in any order.
        query: `(B, H, Q, D)`.
        key: `(B, G, K, D)`.
        visible: Boolean `(B, Q, K)`.

    Returns:
        Boolean `(B, H, Q, K)`.
    """
    batch, heads, queries, _ = query.shape
    keys, group = key.shape[2], heads // key.shape[1]
    result = torch.zeros(batch, heads, queries, keys, dtype=torch.bool)
    for b in range(batch):
        for h in range(heads):
            for q in range(queries):
                seen = [k for k in range(keys) if visible[b, q, k]]
                scores = (key[b, h // group] @ query[b, h, q]).tolist()
                position = keys - queries + q
                chosen: set[int] = set()
                for masker in config_to_dict(config)["maskers"]:
                    size = next(value for name, value in masker.items() if name != "type")
                    count = int(size * len(seen)) if isinstance(size, float) else size
                    if masker["type"] == "sink":
                        chosen |= set(seen[:count])
                    elif masker["type"] == "local":
                        chosen |= {k for k in seen if position - count < k <= position}
                    else:
                        rest = [k for k in seen if k not in chosen]
                        chosen |= set(sorted(rest, key=lambda k: (-scores[k], k))[:count])
                result[b, h, q, sorted(chosen)] = True
    return result


def causal(batch: int, queries: int, keys: int, padding: int = 0) -> torch.Tensor:
    """Boolean `(B, Q, K)`; row b has `b * padding` tokens of padding on the left."""
    allowed = torch.arange(keys) <= torch.arange(keys - queries, keys)[:, None]
    rows = [allowed & (torch.arange(keys) >= b * padding) for b in range(batch)]
    return torch.stack(rows)


def additive(visible: torch.Tensor) -> torch.Tensor:
    """The mask that transformers makes of `(B, Q, K)`: `(B, 1, Q, K)`."""
    mask = torch.zeros(visible.shape)
    return mask.masked_fill(~visible, torch.finfo(torch.float32).min)[:, None]


def integers(batch: int, heads: int, kv_heads: int, queries: int, keys: int, seed: int = 0):
    """Query and key whose scores are small integers: exact in any order, and full of ties."""
    generator = torch.Generator().manual_seed(seed)

    def make(*shape: int) -> torch.Tensor:
        return torch.randint(-2, 3, shape, generator=generator).float()

    return make(batch, heads, queries, 4), make(batch, kv_heads, keys, 4)
