"""Configurations with a name."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from sparse_attention_hub.sparse_attention.research_attention.base import ResearchAttentionConfig
from sparse_attention_hub.sparse_attention.research_attention.maskers.fixed import (
    LocalMaskerConfig,
    OracleTopKConfig,
    SinkMaskerConfig,
)

PRESETS: Mapping[str, ResearchAttentionConfig] = MappingProxyType(
    {
        # StreamingLLM (Xiao et al. 2023): 4 sinks, the rest of a 1,024-token cache is recent.
        "streaming-llm": ResearchAttentionConfig(
            [SinkMaskerConfig(sink_size=4), LocalMaskerConfig(window_size=1020)]
        ),
        # What exact top-k heavy hitters can reach; an upper bound to study, not a way to be fast.
        "sink-local-oracle": ResearchAttentionConfig(
            [
                SinkMaskerConfig(sink_size=128),
                LocalMaskerConfig(window_size=128),
                OracleTopKConfig(heavy_size=0.1),
            ]
        ),
    }
)
"""By name; `get_preset` has the better error."""


def get_preset(name: str) -> ResearchAttentionConfig:
    """The configuration of a preset.

    Raises:
        ValueError: There is none of that name; the message lists those there are.
    """
    preset = PRESETS.get(name) if isinstance(name, str) else None
    if preset is None:
        raise ValueError(f"{name!r} is not a preset; allowed: {', '.join(sorted(PRESETS))}")
    return preset
