"""Maskers, masks and attention with a mask; needs torch and nothing else."""

from sparse_attention_hub.sparse_attention.base import SparseAttention, SparseAttentionConfig
from sparse_attention_hub.sparse_attention.metadata import SparseAttentionMetadata
from sparse_attention_hub.sparse_attention.research_attention import (
    ResearchAttention,
    ResearchAttentionConfig,
)
from sparse_attention_hub.sparse_attention.research_attention.maskers import (
    MaskerConfig,
    ResearchMasker,
)
from sparse_attention_hub.sparse_attention.research_attention.maskers.fixed import (
    CausalMasker,
    FixedMasker,
    FixedMaskerConfig,
    LocalMasker,
    LocalMaskerConfig,
    OracleTopK,
    OracleTopKConfig,
    OracleTopKMasker,
    SinkMasker,
    SinkMaskerConfig,
    TopKMasker,
    TopKMaskerConfig,
)
from sparse_attention_hub.sparse_attention.utils.mask import Mask

__all__ = [
    "CausalMasker",
    "FixedMasker",
    "FixedMaskerConfig",
    "LocalMasker",
    "LocalMaskerConfig",
    "Mask",
    "MaskerConfig",
    "OracleTopK",
    "OracleTopKConfig",
    "OracleTopKMasker",
    "ResearchAttention",
    "ResearchAttentionConfig",
    "ResearchMasker",
    "SinkMasker",
    "SinkMaskerConfig",
    "SparseAttention",
    "SparseAttentionConfig",
    "SparseAttentionMetadata",
    "TopKMasker",
    "TopKMaskerConfig",
]
