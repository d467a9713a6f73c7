"""The maskers that select with certainty, one file each."""

from .causal import CausalMasker
from .local import LocalMasker, LocalMaskerConfig
from .oracle_top_k import OracleTopK, OracleTopKConfig, OracleTopKMasker
from .oracle_top_p import (
    OracleTopPMasker,
    OracleTopPMaskerConfig,
    TopPMasker,
    TopPMaskerConfig,
)
from .quest_top_k import QuestTopKMasker, QuestTopKMaskerConfig
from .sink import SinkMasker, SinkMaskerConfig

__all__ = [
    "CausalMasker",
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
    "TopPMasker",
    "TopPMaskerConfig",
]
