"""A masker of a user's own, in one file."""

from dataclasses import dataclass

import torch

from sparse_attention_hub.sparse_attention.research_attention.maskers.base import (
    MaskerConfig,
    MaskerRegistry,
    ResearchMasker,
    add_selected,
    require_config,
)


@dataclass(frozen=True)
class EveryNthMaskerConfig(MaskerConfig):
    stride: int


@MaskerRegistry.register(EveryNthMaskerConfig)
class EveryNthMasker(ResearchMasker):
    """The query's own key, and every key at a multiple of the stride."""

    def add_mask(self, *, keys, queries, previous_mask, **kwargs):
        num_queries, num_keys = queries.shape[2], keys.shape[2]
        key = torch.arange(num_keys)
        query = torch.arange(num_keys - num_queries, num_keys)[:, None]
        return add_selected(previous_mask, (key % self.config.stride == 0) | (key == query))

    @classmethod
    def create_from_config(cls, config):
        return cls(require_config(config, EveryNthMaskerConfig))
