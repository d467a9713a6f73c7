"""Maskers: what a query reads."""

from sparse_attention_hub.sparse_attention.research_attention.maskers.base import (
    MaskerConfig,
    ResearchMasker,
)

__all__ = ["MaskerConfig", "ResearchMasker"]
