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
    OracleTopPMasker,
    OracleTopPMaskerConfig,
    QuestTopKMasker,
    QuestTopKMaskerConfig,
    SinkMasker,
    SinkMaskerConfig,
    TopKMasker,
    TopKMaskerConfig,
    TopPMasker,
    TopPMaskerConfig,
)
from sparse_attention_hub.sparse_attention.research_attention.maskers.sampling import (
    AdaptiveSamplingMasker,
    AdaptiveSamplingMaskerConfig,
    RandomSamplingMasker,
    RandomSamplingMaskerConfig,
    SamplingMasker,
    SamplingMaskerConfig,
)
from sparse_attention_hub.sparse_attention.utils.mask import Mask

__all__ = [
    "AdaptiveSamplingMasker",
    "AdaptiveSamplingMaskerConfig",
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
    "OracleTopPMasker",
    "OracleTopPMaskerConfig",
    "QuestTopKMasker",
    "QuestTopKMaskerConfig",
    "RandomSamplingMasker",
    "RandomSamplingMaskerConfig",
    "ResearchAttention",
    "ResearchAttentionConfig",
    "ResearchMasker",
    "SamplingMasker",
    "SamplingMaskerConfig",
    "SinkMasker",
    "SinkMaskerConfig",
    "SparseAttention",
    "SparseAttentionConfig",
    "SparseAttentionMetadata",
    "TopKMasker",
    "TopKMaskerConfig",
    "TopPMasker",
    "TopPMaskerConfig",
]
