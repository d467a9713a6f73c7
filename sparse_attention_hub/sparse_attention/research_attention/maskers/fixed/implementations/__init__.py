"""The maskers that select with certainty, one file each."""

from .causal import CausalMasker
from .double_sparsity_top_k import DoubleSparsityTopKMasker, DoubleSparsityTopKMaskerConfig
from .hashattention_top_k import HashAttentionTopKMasker, HashAttentionTopKMaskerConfig
from .local import LocalMasker, LocalMaskerConfig
from .oracle_top_k import OracleTopK, OracleTopKConfig, OracleTopKMasker
from .oracle_top_p import (
    OracleTopPMasker,
    OracleTopPMaskerConfig,
    TopPMasker,
    TopPMaskerConfig,
)
from .pq_top_k import PQCache, PQCacheConfig
from .quest_top_k import QuestTopKMasker, QuestTopKMaskerConfig
from .sink import SinkMasker, SinkMaskerConfig
from .socket_top_k import SocketMasker, SocketMaskerConfig

__all__ = [
    "CausalMasker",
    "DoubleSparsityTopKMasker",
    "DoubleSparsityTopKMaskerConfig",
    "HashAttentionTopKMasker",
    "HashAttentionTopKMaskerConfig",
    "LocalMasker",
    "LocalMaskerConfig",
    "OracleTopK",
    "OracleTopKConfig",
    "OracleTopKMasker",
    "OracleTopPMasker",
    "OracleTopPMaskerConfig",
    "PQCache",
    "PQCacheConfig",
    "QuestTopKMasker",
    "QuestTopKMaskerConfig",
    "SinkMasker",
    "SinkMaskerConfig",
    "SocketMasker",
    "SocketMaskerConfig",
    "TopPMasker",
    "TopPMaskerConfig",
]
