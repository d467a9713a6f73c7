"""Page bounds of Quest, and their scores."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from sparse_attention_hub.sparse_attention.research_attention.maskers.fixed.base import largest
from sparse_attention_hub.sparse_attention.research_attention.maskers.fixed.implementations.utils.common_utils import (  # noqa: E501
    pseudo_quantize,
)
from sparse_attention_hub.sparse_attention.research_attention.maskers.head_groups import (
    per_query_head,
)
from sparse_attention_hub.sparse_attention.research_attention.maskers.key_labels import (
    labels_of_keys,
)
from sparse_attention_hub.sparse_attention.research_attention.maskers.single_row import rows_of
from sparse_attention_hub.sparse_attention.utils.kv_utils import (
    accumulation_dtype,
    grouped_scores,
    repeat_kv,
)
from sparse_attention_hub.sparse_attention.utils.mask import Mask
from sparse_attention_hub.sparse_attention.visibility import visible_keys


def compute_page_min_max(
    keys: torch.Tensor, page_size: int, num_pages: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The smallest and largest key element per page and channel; the last page may be partial.

    Args:
        keys: `(B, G, K, D)`.
        page_size: Keys of a page.
        num_pages: `ceil(K / page_size)`.

    Returns:
        Two `(B, G, num_pages, D)`, in the dtype of `keys`.
    """
    missing = num_pages * page_size - keys.shape[2]

    def paged(fill: float) -> torch.Tensor:
        padded = functional.pad(keys, (0, 0, 0, missing), value=fill)
        return padded.view(*keys.shape[:2], num_pages, page_size, keys.shape[3])

    return paged(torch.inf).amin(dim=3), paged(-torch.inf).amax(dim=3)


def visible_page_bounds(
    keys: torch.Tensor, visible: torch.Tensor, page_size: int, label_bits: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Page bounds of the keys that each query may see, as they would be stored.

    Args:
        keys: `(B, G, K, D)`.
        visible: Boolean `(B, 1 or H, Q, K)`.
        page_size: Keys of a page.
        label_bits: Of a stored bound.

    Returns:
        Two `(B, G, P, D)` when every query sees every key, else `(B, Q, G or H, P, D)`: of as many
        heads as tell their keys apart. Pages without visible keys have bounds of 0.
    """
    num_keys = keys.shape[2]
    num_pages = -(-num_keys // page_size)
    if bool(visible.all()):
        low, high = compute_page_min_max(keys, page_size, num_pages)
        return pseudo_quantize(low, label_bits), pseudo_quantize(high, label_bits)
    if visible.shape[1] > 1:
        keys = repeat_kv(keys, visible.shape[1] // keys.shape[1])
    bounds: list[tuple[torch.Tensor, torch.Tensor]] = []
    for query in range(visible.shape[2]):
        seen = visible[:, :, query, :, None]
        low, _ = compute_page_min_max(keys.masked_fill(~seen, torch.inf), page_size, num_pages)
        _, high = compute_page_min_max(keys.masked_fill(~seen, -torch.inf), page_size, num_pages)
        empty = low == torch.inf
        low, high = low.masked_fill(empty, 0), high.masked_fill(empty, 0)
        bounds.append((pseudo_quantize(low, label_bits), pseudo_quantize(high, label_bits)))
    lows, highs = zip(*bounds, strict=True)
    return torch.stack(lows, dim=1), torch.stack(highs, dim=1)


def stored_page_bounds(
    keys: torch.Tensor,
    page_size: int,
    label_bits: int,
    sparse_meta_data: dict[Any, Any],
    layer_idx: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Page bounds of all keys; those of full pages are computed once and kept.

    Args:
        keys: `(B, G, K, D)`.
        page_size: Keys of a page.
        label_bits: Of a stored bound.
        sparse_meta_data: Where they are kept, see `labels_of_keys`.
        layer_idx: Of the attention layer.

    Returns:
        Two `(B, G, P, D)`.
    """

    def bounds(part: torch.Tensor) -> torch.Tensor:
        low, high = compute_page_min_max(part, page_size, -(-part.shape[2] // page_size))
        return torch.cat(
            [pseudo_quantize(low, label_bits), pseudo_quantize(high, label_bits)], dim=-1
        )

    name = ("quest_pages", page_size, label_bits)
    stored = labels_of_keys(sparse_meta_data, name, layer_idx, keys, bounds, page_size)
    whole = stored.shape[2] * page_size
    if whole < keys.shape[2]:
        stored = torch.cat([stored, bounds(keys[:, :, whole:])], dim=2)
    head_size = keys.shape[3]
    return stored[..., :head_size], stored[..., head_size:]


def add_top_pages(previous_mask: Mask, scores: torch.Tensor, count: int, page_size: int) -> Mask:
    """The union of a mask and the `count` best pages with something left to select.

    Args:
        previous_mask: `(B, H, 1, K)`, by index; not modified.
        scores: float32 `(B, U, 1, P)`; the lower page wins ties.
        count: Pages, at most P.
        page_size: Keys of a page.
    """
    _, heads, _, num_keys = previous_mask.shape
    units = scores.shape[1]
    indices, weights = rows_of(previous_mask)
    held = (weights > 0).to(torch.int32)
    # Keys of a page that all query heads of the unit have; a page is out when these are all of it.
    per_key = torch.zeros(*scores.shape[:3], num_keys, dtype=torch.int32, device=scores.device)
    if indices.shape[-1]:
        flat = (scores.shape[0], units, 1, -1)
        per_key.scatter_add_(-1, indices.reshape(flat), held.reshape(flat))
    left = allowed_pages(per_key < heads // units, page_size)
    chosen = largest(scores, left, count, count)
    # Exactly `count` positions of pages, chosen ones first; the rest weighs nothing.
    best = chosen.to(torch.int8).topk(count, dim=-1)
    keys = best.indices.unsqueeze(-1) * page_size + torch.arange(page_size, device=scores.device)
    valid = (best.values > 0).unsqueeze(-1) & (keys < num_keys)
    keys, valid = keys.clamp(max=num_keys - 1).flatten(3), valid.flatten(3)
    chosen = per_query_head(chosen, heads)
    kept = weights * ~chosen.gather(-1, indices // page_size)
    return Mask.create_from_rows(
        previous_mask.shape,
        torch.cat([indices, per_query_head(keys, heads)], dim=-1),
        torch.cat([kept, per_query_head(valid, heads).to(weights.dtype)], dim=-1),
    )


def quest_page_scores(
    queries: torch.Tensor, page_min: torch.Tensor, page_max: torch.Tensor
) -> torch.Tensor:
    """Upper bounds of the unscaled scores in each page.

    `max(q * low, q * high)` is `q * high` for q > 0 and `q * low` for q < 0, so two matrix products
    give the sum over channels without a tensor per channel.

    Args:
        queries: `(B, H, Q, D)`.
        page_min: `(B, G, P, D)`, or `(B, Q, G, P, D)` with bounds for each query.
        page_max: Likewise.

    Returns:
        `(B, H, Q, P)`, at least float32.
    """
    queries = queries.to(accumulation_dtype(queries.dtype))
    up, down = queries.clamp(min=0), queries.clamp(max=0)
    if page_min.ndim == 4:
        return grouped_scores(up, page_max) + grouped_scores(down, page_min)
    columns = [
        grouped_scores(up[:, :, i : i + 1], page_max[:, i])
        + grouped_scores(down[:, :, i : i + 1], page_min[:, i])
        for i in range(queries.shape[2])
    ]
    return torch.cat(columns, dim=2)


def allowed_pages(candidates: torch.Tensor, page_size: int) -> torch.Tensor:
    """Pages with at least one candidate.

    Args:
        candidates: Boolean `(..., K)`.
        page_size: Keys of a page.

    Returns:
        Boolean `(..., P)`.
    """
    num_keys = candidates.shape[-1]
    num_pages = -(-num_keys // page_size)
    padded = functional.pad(candidates, (0, num_pages * page_size - num_keys))
    return padded.view(*candidates.shape[:-1], num_pages, page_size).any(dim=-1)


def keys_of_pages(pages: torch.Tensor, num_keys: int, page_size: int) -> torch.Tensor:
    """What pages have, for each of their keys.

    Args:
        pages: `(..., P)`, such as whether each is chosen.
        num_keys: K.
        page_size: Keys of a page.

    Returns:
        `(..., K)`.
    """
    return pages.repeat_interleave(page_size, dim=-1)[..., :num_keys]


def pages_to_token_mask(
    topk_pages: torch.Tensor,
    num_keys: int,
    page_size: int,
    device: torch.device,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The keys of listed pages, as in the field's API.

    Args:
        topk_pages: Integers `(..., n)`, indices of pages.
        num_keys: K.
        page_size: Keys of a page.
        device: Of the result.
        dtype: Likewise.

    Returns:
        `(..., K)`, 1 for keys of these pages and 0 for others.
    """
    num_pages = -(-num_keys // page_size)
    pages = torch.zeros(*topk_pages.shape[:-1], num_pages, dtype=torch.bool, device=device)
    pages.scatter_(-1, topk_pages.to(device, torch.int64), True)
    return keys_of_pages(pages, num_keys, page_size).to(dtype)


def attention_mask_to_allowed_prob(attention_mask: torch.Tensor, num_keys: int) -> torch.Tensor:
    """Which keys a mask lets queries see, as in the field's API but for boolean masks.

    (There, True of a boolean mask hides a key; here it shows it, as in transformers. There, any
    negative bias hides one; here only a mask's does, see `visible_keys`.)

    Args:
        attention_mask: `(B, 1 or H, Q, >= K)` or `(B, Q, >= K)`.
        num_keys: K.

    Returns:
        float32 `(B, 1 or H, Q, K)`, 1 for visible keys and 0 for others.
    """
    if attention_mask.ndim == 3:
        attention_mask = attention_mask.unsqueeze(1)
    visible = visible_keys(attention_mask, num_keys)
    assert visible is not None  # there is a mask
    return visible.float()


def pages_valid(allowed: torch.Tensor, page_size: int, num_pages: int) -> torch.Tensor:
    """Pages with a key that some head may see, as in the field's API.

    Args:
        allowed: `(B, 1 or H, Q, K)`, > 0 for visible keys.
        page_size: Keys of a page.
        num_pages: At least `ceil(K / page_size)`.

    Returns:
        Boolean `(B, Q, num_pages)`.

    Raises:
        ValueError: The pages do not hold all keys.
    """
    pages = allowed_pages((allowed > 0).any(dim=1), page_size)
    if num_pages < pages.shape[-1]:
        raise ValueError(f"num_pages must be >= {pages.shape[-1]}, got {num_pages}")
    return functional.pad(pages, (0, num_pages - pages.shape[-1]))
