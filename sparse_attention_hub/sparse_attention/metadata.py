"""Per-layer sparse attention metadata (public name of the field's API)."""

from __future__ import annotations


class SparseAttentionMetadata:
    """Marker type for what maskers keep between calls.

    Maskers receive a plain dict, `sparse_meta_data`. It is a cache and nothing more: a masker
    gives the same result with a fresh, empty dict.
    """
