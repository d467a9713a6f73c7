"""What one engine's layers do with each configuration on the device, and the memory for it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sparse_attention_hub.sparse_attention.research_attention import ResearchAttentionConfig
from sparse_attention_hub.sparse_attention.research_attention.maskers.base import MaskerConfig
from sparse_attention_hub.sparse_attention.serialization import config_to_json
from vllm_sparse_plugin.masked_attention import attention_of
from vllm_sparse_plugin.paged.attention import scanned_bytes_per_block
from vllm_sparse_plugin.paged.device.attention import DeviceAttention
from vllm_sparse_plugin.paged.device.space import DeviceSpace, queries_within
from vllm_sparse_plugin.paged.layout import BlockLayout
from vllm_sparse_plugin.paged.learned_index import LearnedIndex
from vllm_sparse_plugin.paged.maskers.base import Unsupported
from vllm_sparse_plugin.paged.served import require_indices, say_once

logger = logging.getLogger(__name__)

BUDGET_BYTES = 1 << 30
"""Memory for the launches of one list of maskers; more queries go in slices."""
STATES_BYTES = 1 << 30
"""Memory for what one index has learned; of more sequences than fit, it is learned again."""


@dataclass(frozen=True)
class Limits:
    """How much there is of anything in one engine.

    Attributes:
        max_queries: Requests that decode in a step.
        capacity: Keys that a query may see, a multiple of 16.
        max_tokens: New keys of a step.
        max_sequences: Sequences of which something learned is held, see `sequences_within`.
    """

    max_queries: int
    capacity: int
    max_tokens: int
    max_sequences: int = 1


@dataclass(frozen=True)
class LayerUse:
    """What the layers of a KV cache group do with a configuration.

    Attributes:
        attentions: Of layers with maskers on the fast path, each list of maskers once.
        fast_layers: How many take the fast path.
        dense_layers: How many stay dense.
        general_layers: How many take the general path.
        scanned_bytes_per_block: Bytes that maskers read of a block to select, over all layers.
        learns: Whether any of them needs to know the queries' sequences.
    """

    attentions: tuple[DeviceAttention, ...]
    fast_layers: int
    dense_layers: int
    general_layers: int
    scanned_bytes_per_block: int
    learns: bool


class DevicePlanner:
    """Finds, for a configuration and layer, the attention that serves it; and keeps them.

    Attributes:
        layout: Of the engine's blocks.
        limits: Of the engine.
        device: Of its memory.
        space: For what belongs to no list of maskers, such as the networks of an index.
    """

    def __init__(
        self,
        layout: BlockLayout,
        limits: Limits,
        device: torch.device,
        own: ResearchAttentionConfig | None,
    ) -> None:
        """Asks for no memory yet.

        Args:
            layout: See the class.
            limits: Likewise.
            device: Likewise.
            own: The engine's own configuration; None: every layer takes the general path.
        """
        self.layout = layout
        self.limits = limits
        self.device = device
        self._own = own
        self._own_json = None if own is None else config_to_json(own)
        self.space = self._space(1, device)
        self._spaces: dict[int, DeviceSpace] = {}
        self._attentions: dict[tuple[MaskerConfig, ...], DeviceAttention | None] = {}
        self._of_layers: dict[tuple[str, int], DeviceAttention | None] = {}
        self._uses: dict[tuple[str, tuple[int, ...]], LayerUse] = {}

    def reserve(self) -> None:
        """Asks for the memory of the engine's own configuration."""
        if self._own is None or self._own_json is None:
            return
        for configs in (self._own.masker_configs, *self._own.layer_masker_configs.values()):
            if configs:
                self._attention(tuple(configs), self._own_json)

    def attention(self, config_json: str, layer_index: int) -> DeviceAttention | None:
        """The fast path of a configuration in a layer that has maskers; None: the general path.

        Args:
            config_json: Of a request.
            layer_index: Of the attention layer.
        """
        key = (config_json, layer_index)
        if key not in self._of_layers:
            self._of_layers[key] = self._attention(_configs(config_json, layer_index), config_json)
        return self._of_layers[key]

    def use(self, config_json: str, layers: Sequence[int]) -> LayerUse:
        """What some layers do with a configuration.

        Args:
            config_json: Of a request.
            layers: Their indices.
        """
        key = (config_json, tuple(layers))
        if key not in self._uses:
            self._uses[key] = self._use(config_json, layers)
        return self._uses[key]

    def _use(self, config_json: str, layers: Sequence[int]) -> LayerUse:
        masked = [layer for layer in layers if _configs(config_json, layer)]
        found = [self.attention(config_json, layer) for layer in masked]
        fast = [attention for attention in found if attention is not None]
        return LayerUse(
            attentions=tuple(dict.fromkeys(fast)),
            fast_layers=len(fast),
            dense_layers=len(layers) - len(masked),
            general_layers=len(found) - len(fast),
            scanned_bytes_per_block=sum(
                scanned_bytes_per_block(attention.paged, self.layout.shape) for attention in fast
            ),
            learns=any(attention.learns for attention in fast),
        )

    def _attention(
        self, configs: tuple[MaskerConfig, ...], config_json: str
    ) -> DeviceAttention | None:
        if self._own is None:
            return None
        if configs not in self._attentions:
            self._attentions[configs] = self._make(configs, config_json)
        return self._attentions[configs]

    def _make(self, configs: tuple[MaskerConfig, ...], config_json: str) -> DeviceAttention | None:
        try:
            queries = self._queries_at_once(configs)
            if config_json != self._own_json:
                # Other lists take the memory there is: clients bring as many as they like.
                queries = max((held for held in self._spaces if held <= queries), default=queries)
            if queries not in self._spaces:
                self._spaces[queries] = self._space(queries, self.device)
            attention = DeviceAttention(configs, self._spaces[queries])
            require_indices(attention.paged, self.layout)
        except Unsupported as reason:
            say_once(config_json, str(reason))
            return None
        held = sum(space.num_bytes for space in self._spaces.values())
        logger.info(
            "sparse attention: %d queries at a time, %.0f MiB of memory for them",
            queries,
            held / (1 << 20),
        )
        return attention

    def _queries_at_once(self, configs: Sequence[MaskerConfig]) -> int:
        def bytes_of(queries: int) -> int:
            space = self._space(queries, torch.device("meta"))
            DeviceAttention(configs, space)
            return space.num_bytes

        return queries_within(BUDGET_BYTES, self.limits.max_queries, bytes_of)

    def _space(self, max_queries: int, device: torch.device) -> DeviceSpace:
        limits = self.limits
        return DeviceSpace(
            self.layout.shape,
            max_queries,
            limits.capacity,
            limits.max_tokens,
            device,
            limits.max_sequences,
        )


def sequences_within(budget: int, most: int, layout: BlockLayout, num_layers: int) -> int:
    """Of how many sequences all layers can hold what they have learned; at least 1.

    Args:
        budget: Bytes, of each index.
        most: Sequences of a step.
        layout: Of the blocks.
        num_layers: With such blocks.
    """
    learned = [index for index in layout.indices if isinstance(index, LearnedIndex)]
    sizes = [4 * num_layers * index.state_width(layout.shape) for index in learned]
    return max(1, min([most, *[budget // size for size in sizes]]))


def _configs(config_json: str, layer_index: int) -> tuple[MaskerConfig, ...]:
    maskers = attention_of(config_json).maskers_of_layer(layer_index)
    return tuple(masker.config for masker in maskers)
