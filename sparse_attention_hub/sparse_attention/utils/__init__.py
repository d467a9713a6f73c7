"""Masks, and attention under a mask (module paths of the field's API)."""

from sparse_attention_hub.sparse_attention.utils.mask import Mask

__all__ = ["Mask"]
