"""Maskers that select each key with certainty."""

from sparse_attention_hub.sparse_attention.research_attention.maskers.fixed.base import (
    FixedMasker,
    FixedMaskerConfig,
    TopKMasker,
    TopKMaskerConfig,
)
from sparse_attention_hub.sparse_attention.research_attention.maskers.fixed.implementations import (
    CausalMasker,
    LocalMasker,
    LocalMaskerConfig,
    OracleTopK,
    OracleTopKConfig,
    OracleTopKMasker,
    OracleTopPMasker,
    OracleTopPMaskerConfig,
    QuestTopKMasker,
    QuestTopKMaskerConfig,
    SinkMasker,
    SinkMaskerConfig,
    TopPMasker,
    TopPMaskerConfig,
)

__all__ = [
    "CausalMasker",
    "FixedMasker",
    "FixedMaskerConfig",
    "LocalMasker",
    "LocalMaskerConfig",
    "OracleTopK",
    "OracleTopKConfig",
    "OracleTopKMasker",
    "OracleTopPMasker",
    "OracleTopPMaskerConfig",
    "QuestTopKMasker",
    "QuestTopKMaskerConfig",
    "SinkMasker",
    "SinkMaskerConfig",
    "TopKMasker",
    "TopKMaskerConfig",
    "TopPMasker",
    "TopPMaskerConfig",
]
