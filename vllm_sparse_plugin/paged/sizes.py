"""How many keys maskers want of queries that see so many: the same numbers on every device."""

from __future__ import annotations

import numpy as np

from sparse_attention_hub.sparse_attention.research_attention.maskers.sizes import Size


def sizes_of(lengths: np.ndarray, size: Size) -> np.ndarray:
    """A masker's size in keys, for each query; see `resolve_size`.

    Not `resolve_size` itself: in each layer, torch took as long for it as a kernel.

    Args:
        lengths: `[num_queries]`, an integer type: keys that each sees.
        size: Keys, or a share of those that are seen.

    Returns:
        `[num_queries]`, int64.
    """
    lengths = lengths.astype(np.int64)
    wanted = lengths * size if isinstance(size, float) else np.minimum(lengths, size)
    return np.asarray(wanted, np.int64)


def ends_within(lengths: np.ndarray, size: Size) -> np.ndarray:
    """The lengths of queries that see no more than a size given in keys; 0 for the others.

    Args:
        lengths: As in `sizes_of`.
        size: Likewise; a share gives zeros.

    Returns:
        `[num_queries]`, int64.
    """
    limit = size if isinstance(size, int) else 0
    return np.where(lengths <= limit, lengths, 0).astype(np.int64)


def page_counts(lengths: np.ndarray, size: Size, page_size: int, least: int) -> np.ndarray:
    """Pages for a size in keys: at least some, at most all; all where every key is wanted.

    Args:
        lengths: As in `sizes_of`.
        size: Likewise.
        page_size: Keys of a page.
        least: Pages.

    Returns:
        `[num_queries]`, int64.
    """
    wanted = sizes_of(lengths, size)
    every = -(-lengths.astype(np.int64) // page_size)
    counts = np.minimum(every, np.maximum(least, wanted // page_size))
    return np.where(wanted >= lengths, every, counts)
