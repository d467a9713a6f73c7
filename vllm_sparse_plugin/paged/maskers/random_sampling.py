"""Random sampling on pages: it reads no key but those that it samples."""

from __future__ import annotations

from typing import ClassVar

from sparse_attention_hub.sparse_attention.research_attention.maskers.sampling import (
    RandomSamplingMaskerConfig,
)
from vllm_sparse_plugin.paged.kernels.sampling import sample_share
from vllm_sparse_plugin.paged.maskers.base import PagedMasker, PagedQueries, counterpart_of


@counterpart_of(RandomSamplingMaskerConfig)
class PagedRandomSamplingMasker(PagedMasker):
    """See `RandomSamplingMasker`."""

    samples: ClassVar[bool] = True

    def select(self, queries: PagedQueries) -> None:
        """See `PagedMasker.select`."""
        with queries.as_units_of(self.config.head_granularity) as units:
            sample_share(
                self.config.sampling_rate,
                self.config.seed,
                queries.cache.layer_index,
                self.shape.num_heads,
                units.lengths,
                units.flags,
                units.probability,
            )
