"""The maskers that select with certainty, one file each."""

from .causal import CausalMasker
from .local import LocalMasker, LocalMaskerConfig
from .oracle_top_k import OracleTopK, OracleTopKConfig, OracleTopKMasker
from .sink import SinkMasker, SinkMaskerConfig

__all__ = [
    "CausalMasker",
    "LocalMasker",
    "LocalMaskerConfig",
    "OracleTopK",
    "OracleTopKConfig",
    "OracleTopKMasker",
    "SinkMasker",
    "SinkMaskerConfig",
]
