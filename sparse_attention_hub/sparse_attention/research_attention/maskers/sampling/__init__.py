"""Maskers that select keys at random, with a known probability each."""

from sparse_attention_hub.sparse_attention.research_attention.maskers.sampling.base import (
    SamplingMasker,
    SamplingMaskerConfig,
)
from sparse_attention_hub.sparse_attention.research_attention.maskers.sampling.implementations import (  # noqa: E501
    AdaptiveSamplingMasker,
    AdaptiveSamplingMaskerConfig,
    MagicPig,
    MagicPigConfig,
    RandomSamplingMasker,
    RandomSamplingMaskerConfig,
)

__all__ = [
    "AdaptiveSamplingMasker",
    "AdaptiveSamplingMaskerConfig",
    "MagicPig",
    "MagicPigConfig",
    "RandomSamplingMasker",
    "RandomSamplingMaskerConfig",
    "SamplingMasker",
    "SamplingMaskerConfig",
]
