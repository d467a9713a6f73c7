"""Quest masker: pages of keys, ranked by the highest score that their bounds allow.

Tang et al. 2024, "Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference", section
3.3: per page and channel the smallest and largest key element; a page's score is
`sum_d max(q_d * min_d, q_d * max_d)`, an upper bound of every score in it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from sparse_attention_hub.sparse_attention.research_attention.maskers.base import (
    MaskerConfig,
    MaskerFacts,
    MaskerRegistry,
    add_selected,
    require_config,
    unselected_keys,
)
from sparse_attention_hub.sparse_attention.research_attention.maskers.fixed.base import (
    TopKMasker,
    TopKMaskerConfig,
    largest,
)
from sparse_attention_hub.sparse_attention.research_attention.maskers.fixed.implementations.utils.common_utils import (  # noqa: E501
    check_integer_field,
)
from sparse_attention_hub.sparse_attention.research_attention.maskers.fixed.implementations.utils.quest_utils import (  # noqa: E501
    add_top_pages,
    allowed_pages,
    keys_of_pages,
    quest_page_scores,
    stored_page_bounds,
    visible_page_bounds,
)
from sparse_attention_hub.sparse_attention.research_attention.maskers.head_groups import (
    any_of_groups,
    most_of_groups,
    per_query_head,
    pooled_scores,
)
from sparse_attention_hub.sparse_attention.research_attention.maskers.single_row import (
    is_single_row,
)
from sparse_attention_hub.sparse_attention.research_attention.maskers.sizes import resolve_size
from sparse_attention_hub.sparse_attention.utils.mask import Mask
from sparse_attention_hub.sparse_attention.visibility import visible_keys

MIN_PAGES = 3
"""Pages that are read at least, whatever the budget (as in the field's API)."""

_MOST_KEYS_OF_PAGE = 1 << 16
"""The last page is filled up to so many, however short a sequence is."""


def _search_space() -> dict[str, Any]:
    return {
        "heavy_size": {"grid_search": [step / 100 for step in range(1, 11)]},
        "page_size": {"grid_search": [64, 128, 256]},
    }


@dataclass(frozen=True)
class QuestTopKMaskerConfig(TopKMaskerConfig):
    """How many keys are read, in whole pages.

    Attributes:
        page_size: Keys of a page, at most 65,536; independent of the block size of a paged cache.
        label_bits: Of each stored page minimum and maximum, 1 to 16; 16 = as the keys are.
        search_space: For tuners; no part of what the masker does.
    """

    page_size: int
    label_bits: int = 16
    search_space: dict[str, Any] = field(default_factory=_search_space, compare=False)

    def __post_init__(self) -> None:
        """Checks the fields.

        Raises:
            ValueError: Names the field, its value and what is allowed.
        """
        super().__post_init__()
        check_integer_field(self, "page_size", 1, _MOST_KEYS_OF_PAGE)
        check_integer_field(self, "label_bits", 1, 16)


@MaskerRegistry.register(QuestTopKMaskerConfig)
class QuestTopKMasker(TopKMasker):
    """Selects the visible keys of the `heavy_size // page_size` pages with the highest bounds.

    At least `MIN_PAGES` pages; all of them where a query sees no more than `heavy_size` keys. Pages
    start at multiples of `page_size`; a query's last page has the bounds of the keys that the query
    may see. Pages with nothing left to select are passed over; equal bounds: the lower page wins.
    """

    facts: ClassVar[MaskerFacts] = MaskerFacts(
        paper="Quest, Tang et al. 2024",
        state="page minima and maxima",
        index_bytes="(2 · head size · label_bits / 8 + 16) / page_size",
        is_paged=True,
    )

    def __init__(self, config: QuestTopKMaskerConfig) -> None:
        """Keeps the configuration.

        Args:
            config: Of this masker.
        """
        super().__init__(config)
        self.page_size = config.page_size
        self.label_bits = config.label_bits

    def add_mask(
        self,
        keys: torch.Tensor,
        queries: torch.Tensor,
        values: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float,
        dropout: float,
        sparse_meta_data: dict[Any, Any],
        previous_mask: Mask,
        **kwargs: Any,
    ) -> Mask:
        """See `ResearchMasker.add_mask`."""
        if previous_mask.is_full_mask():
            return previous_mask
        num_keys = keys.shape[2]
        if isinstance(self.heavy_size, int) and num_keys <= self.heavy_size:
            return Mask.create_full_mask(previous_mask.shape, previous_mask.dtype, queries.device)
        units = self._units(queries, keys)
        if is_single_row(previous_mask, attention_mask) and keys.dtype != torch.float64:
            place = self.cache_of_layer(sparse_meta_data, kwargs)
            bounds = stored_page_bounds(keys, self.page_size, self.label_bits, *place)
            scores = pooled_scores(quest_page_scores(queries, *bounds), units, scaling)
            return add_top_pages(
                previous_mask, scores, self._num_pages(num_keys, num_keys), self.page_size
            )
        visible = _visible_or_all(queries, num_keys, attention_mask)
        scores = self._page_scores(queries, keys, visible)
        candidates = any_of_groups(unselected_keys(previous_mask, attention_mask), units)
        counts = most_of_groups(visible.sum(dim=-1, keepdim=True), units)
        chosen = largest(
            pooled_scores(scores, units, scaling),
            allowed_pages(candidates, self.page_size),
            self._num_pages(counts, scores.shape[-1] * self.page_size),
            scores.shape[-1],
        )
        chosen = per_query_head(chosen, queries.shape[1])
        return add_selected(
            previous_mask, keys_of_pages(chosen, num_keys, self.page_size) & visible
        )

    def scores(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        attention_mask: torch.Tensor | None,
        sparse_meta_data: dict[Any, Any],
        layer_idx: int,
    ) -> torch.Tensor:
        """See `TopKMasker.scores`: the bound of each key's page."""
        num_keys = keys.shape[2]
        visible = _visible_or_all(queries, num_keys, attention_mask)
        scores = self._page_scores(queries, keys, visible)
        return keys_of_pages(scores, num_keys, self.page_size)

    def _page_scores(
        self, queries: torch.Tensor, keys: torch.Tensor, visible: torch.Tensor
    ) -> torch.Tensor:
        """`(B, H, Q, P)`; -inf for pages without visible keys."""
        bounds = visible_page_bounds(keys, visible, self.page_size, self.label_bits)
        seen = allowed_pages(visible, self.page_size)
        return quest_page_scores(queries, *bounds).masked_fill(~seen, -torch.inf)

    def _num_pages(self, visible: int | torch.Tensor, num_keys: int) -> Any:
        """Pages to read, an int or int64 like `visible`: how many keys a query may see."""
        wanted = resolve_size(self.heavy_size, visible)
        every = -(-num_keys // self.page_size)
        if isinstance(wanted, int):
            return (
                every
                if wanted >= num_keys
                else min(every, max(MIN_PAGES, wanted // self.page_size))
            )
        pages = (wanted // self.page_size).clamp(min=MIN_PAGES)
        return torch.where(wanted >= torch.as_tensor(visible), every, pages)

    @classmethod
    def create_from_config(cls, config: MaskerConfig) -> QuestTopKMasker:
        """See `ResearchMasker.create_from_config`."""
        return cls(require_config(config, QuestTopKMaskerConfig))


def _visible_or_all(
    queries: torch.Tensor, num_keys: int, attention_mask: torch.Tensor | None
) -> torch.Tensor:
    """As `visible_keys`, for every sequence and query: `(B, 1 or H, Q, K)`."""
    visible = visible_keys(attention_mask, num_keys)
    if visible is None:
        visible = torch.ones(1, 1, 1, num_keys, dtype=torch.bool, device=queries.device)
    return visible.expand(queries.shape[0], visible.shape[1], queries.shape[2], num_keys)
