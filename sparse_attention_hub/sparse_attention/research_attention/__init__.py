"""Attention that a list of maskers makes sparse."""

from sparse_attention_hub.sparse_attention.research_attention.base import (
    ResearchAttention,
    ResearchAttentionConfig,
)

__all__ = ["ResearchAttention", "ResearchAttentionConfig"]
