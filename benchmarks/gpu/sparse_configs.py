"""The maskers that are measured."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparse_attention_hub.sparse_attention.research_attention.maskers.fixed.implementations.utils.double_sparsity_utils import (  # noqa: E501
    channel_key,
)

Maskers = list[dict[str, Any]]

QUEST_5, QUEST_10 = "Quest, page 16, 5 %", "Quest, page 16, 10 %"
TOKENS_10 = "Double Sparsity (token-level), 10 %"
PER_QUERY_HEAD = ", per query head"
"""Names; without the last one, the query heads of a KV head select together."""
SINK, WINDOW = 128, 256
PAGE_SIZE, LABEL_BITS = 16, 4
MOST_LAYERS = 4
"""That are measured one after the other."""
ADAPTIVE: dict[str, Any] = {
    "type": "adaptive_sampling",
    "base_rate_sampling": 0.02,
    "epsilon": 0.1,
    "delta": 0.1,
    "init_offset": 0,
    "local_offset": 0,
    "head_granularity": "kv_head",
}


@dataclass(frozen=True)
class SparseCase:
    """A list of maskers.

    Attributes:
        name: In tables.
        maskers: As a server is configured with them.
        density: Of the keys, that each head that selects reads; None where that is not given.
    """

    name: str
    maskers: Maskers
    density: float | None


def sink_and_window(keys: int) -> list[dict[str, Any]]:
    """What every list begins with; less of it where there are few keys.

    Args:
        keys: That a query sees.
    """
    sink, window = min(SINK, keys // 64), min(WINDOW, keys // 64)
    return [{"type": "sink", "sink_size": sink}, {"type": "local", "window_size": window}]


def with_heavy(kind: str, keys: int, density: float, granularity: str, **fields: Any) -> Maskers:
    """Sinks, a window, and the best of the other keys: a share of all keys together.

    Args:
        kind: Of the masker that finds the best.
        keys: That a query sees.
        density: Of all maskers together.
        granularity: Who selects, "kv_head" or "query_head".
        fields: Of the masker, besides.
    """
    fixed = sink_and_window(keys)
    taken = fixed[0]["sink_size"] + fixed[1]["window_size"]
    share = density - taken / keys
    return [
        *fixed,
        {"type": kind, "heavy_size": share, "head_granularity": granularity, **fields},
    ]


def quest(keys: int, density: float, granularity: str = "kv_head") -> Maskers:
    """Quest over pages of 16 keys with bounds of 4 bits; see `with_heavy`."""
    sizes = {"page_size": PAGE_SIZE, "label_bits": LABEL_BITS}
    return with_heavy("quest_top_k", keys, density, granularity, **sizes)


def sparse_cases(keys: int, folder: Path, kv_heads: int, head_size: int) -> list[SparseCase]:
    """All lists, for one context length.

    Args:
        keys: That a query sees.
        folder: For the channels of Double Sparsity, in any order: that does not change the time.
        kv_heads: Of the layer.
        head_size: Of the layer.
    """
    file = folder / "channels.json"
    order = list(range(head_size))
    channels = {channel_key(layer, "qk_proj"): [order] * kv_heads for layer in range(MOST_LAYERS)}
    file.write_text(json.dumps(channels))
    labels = {"sorted_channel_file": str(file), "label_bits": LABEL_BITS}
    codes = {"pq_sub_dim": head_size // 4, "pq_bits": 6}
    cases = [
        SparseCase(QUEST_5, quest(keys, 0.05), 0.05),
        SparseCase(QUEST_10, quest(keys, 0.1), 0.1),
        SparseCase(
            TOKENS_10, with_heavy("double_sparsity_top_k", keys, 0.1, "kv_head", **labels), 0.1
        ),
    ]
    for name, share in ((QUEST_5, 0.05), (QUEST_10, 0.1)):
        maskers = quest(keys, share, "query_head")
        cases.append(SparseCase(name + PER_QUERY_HEAD, maskers, None))
    cases += [
        SparseCase(
            TOKENS_10 + PER_QUERY_HEAD,
            with_heavy("double_sparsity_top_k", keys, 0.1, "query_head", **labels),
            None,
        ),
        SparseCase("oracle top-k, 10 %", with_heavy("oracle_top_k", keys, 0.1, "kv_head"), 0.1),
        SparseCase("PQCache, 10 %", with_heavy("pq_cache", keys, 0.1, "kv_head", **codes), 0.1),
        SparseCase("sink + window", sink_and_window(keys), (SINK + WINDOW) / keys),
        SparseCase("vAttention over Quest", [*quest(keys, 0.05), ADAPTIVE], None),
    ]
    return cases
