"""`ResearchAttention`: maskers applied one after the other, then attention under their mask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sparse_attention_hub.sparse_attention.base import SparseAttention, SparseAttentionConfig
from sparse_attention_hub.sparse_attention.research_attention.maskers.base import (
    MaskerConfig,
    ResearchMasker,
)
from sparse_attention_hub.sparse_attention.research_attention.maskers.sampling.base import (
    SamplingMaskerConfig,
)
from sparse_attention_hub.sparse_attention.utils.kv_utils import accumulation_dtype
from sparse_attention_hub.sparse_attention.utils.mask import Mask
from sparse_attention_hub.sparse_attention.utils.mask_attention_utils import (
    get_masked_attention_output,
)


@dataclass(frozen=True)
class ResearchAttentionConfig(SparseAttentionConfig):
    """A list of maskers.

    Attributes:
        masker_configs: Applied in this order; each adds to what the ones before it selected.
            No maskers = dense attention.
    """

    masker_configs: list[MaskerConfig]

    def __post_init__(self) -> None:
        """Copies the list, so that the caller's stays the caller's.

        Raises:
            ValueError: An element is not a masker's configuration, or more than one samples.
        """
        for index, config in enumerate(self.masker_configs):
            if not isinstance(config, MaskerConfig):
                raise ValueError(f"masker_configs[{index}] must be a MaskerConfig, got {config!r}")
        sampling = [c for c in self.masker_configs if isinstance(c, SamplingMaskerConfig)]
        if len(sampling) > 1:
            raise ValueError(f"at most one sampling masker is allowed, got {sampling!r}")
        object.__setattr__(self, "masker_configs", list(self.masker_configs))

    def __hash__(self) -> int:
        """Of the maskers; a list has no hash of its own."""
        return hash(tuple(repr(config) for config in self.masker_configs))


class ResearchAttention(SparseAttention):
    """Sparse attention as a list of maskers, for any of them: right and plain, not fast.

    Attributes:
        maskers: In the order they are applied.
    """

    def __init__(
        self, sparse_attention_config: SparseAttentionConfig, maskers: Sequence[ResearchMasker]
    ) -> None:
        """Takes the maskers.

        Args:
            sparse_attention_config: They were made from.
            maskers: In the order they are applied.
        """
        super().__init__(sparse_attention_config)
        self.maskers = list(maskers)

    @classmethod
    def create_from_config(cls, config: SparseAttentionConfig) -> ResearchAttention:
        """Builds the maskers of a configuration.

        Raises:
            TypeError: The configuration is of another type.
        """
        if not isinstance(config, ResearchAttentionConfig):
            raise TypeError(f"expected a ResearchAttentionConfig, got {type(config).__name__}")
        maskers = [ResearchMasker.create_masker_from_config(item) for item in config.masker_configs]
        return cls(config, maskers)

    def select(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float,
        dropout: float,
        sparse_meta_data: dict[Any, Any],
        **kwargs: Any,
    ) -> Mask:
        """What the maskers select; arguments as in `custom_attention`.

        Returns:
            A mask `(B, H, Q, K)`; full when there are no maskers.
        """
        shape = (*queries.shape[:3], keys.shape[2])
        dtype = accumulation_dtype(queries.dtype)
        if not self.maskers:
            return Mask.create_full_mask(shape, dtype, queries.device)
        mask = Mask.create_empty_mask(shape, dtype, queries.device)
        for masker in self.maskers:
            mask = masker.add_mask(
                keys=keys,
                queries=queries,
                values=values,
                attention_mask=attention_mask,
                scaling=scaling,
                dropout=dropout,
                sparse_meta_data=sparse_meta_data,
                previous_mask=mask,
                **kwargs,
            )
        return mask

    def custom_attention(
        self,
        module: torch.nn.Module | None,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float,
        dropout: float,
        sparse_meta_data: dict[Any, Any],
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention over what the maskers select; see `SparseAttention.custom_attention`.

        Returns:
            The output `(B, Q, H, Dv)`, contiguous, and the weights `(B, H, Q, K)`.
        """
        mask = self.select(
            queries, keys, values, attention_mask, scaling, dropout, sparse_meta_data, **kwargs
        )
        return get_masked_attention_output(
            module, queries, keys, values, attention_mask, scaling, dropout, mask, True
        )
