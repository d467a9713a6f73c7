"""What one engine's layers do with each configuration on the device, and the memory for it."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from sparse_attention_hub.sparse_attention.research_attention import ResearchAttentionConfig
from sparse_attention_hub.sparse_attention.research_attention.maskers.base import MaskerConfig
from sparse_attention_hub.sparse_attention.serialization import config_to_json
from vllm_sparse_plugin.general_path import COSTLY_MASKERS, take_memory
from vllm_sparse_plugin.paged.attention import scanned_bytes_per_block
from vllm_sparse_plugin.paged.device.attention import DeviceAttention, device_maskers
from vllm_sparse_plugin.paged.device.space import DeviceMemory, DeviceSpace, queries_within
from vllm_sparse_plugin.paged.layout import BlockLayout
from vllm_sparse_plugin.paged.learned_index import LearnedIndex
from vllm_sparse_plugin.paged.maskers.base import Unsupported
from vllm_sparse_plugin.paged.served import configs_of_layer, require_indices, say_once

logger = logging.getLogger(__name__)

BUDGET_BYTES = 1 << 30
"""Scratch memory of the engine's own maskers, at most; more queries go in slices."""
CLIENTS_BYTES = 1 << 28
"""Scratch memory that there is in any case for maskers that requests bring."""
STATES_BYTES = 1 << 30
"""Memory for what one index has learned; of more sequences than fit, it is learned again."""
_MOST_CONFIGURATIONS = 256
"""Of requests, for which layers remember what they do."""


@dataclass(frozen=True)
class Limits:
    """How much there is of anything in one engine.

    Attributes:
        max_queries: Requests that decode in a step.
        capacity: Keys that a query may see, a multiple of 16.
        max_tokens: New keys of a step.
        max_sequences: Sequences of which something learned is held, see `sequences_within`.
        brings_maskers: Whether requests may.
        has_fast_path: Whether any maskers run on pages; else all take the general path.
    """

    max_queries: int
    capacity: int
    max_tokens: int
    max_sequences: int = 1
    brings_maskers: bool = False
    has_fast_path: bool = True


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
    """Finds, for a configuration and layer, the attention that serves it; and keeps it.

    All lists of maskers share one piece of scratch memory, as they run one after the other. The
    engine's own say how much it is, those of this planner or of the one whose memory it has; those
    that requests bring take as many queries at once as fit.

    Attributes:
        layout: Of the engine's blocks.
        limits: Of the engine.
        device: Of its memory.
        space: For what belongs to no list of maskers, such as the networks of an index.
        memory: That its lists of maskers share.
    """

    def __init__(
        self,
        layout: BlockLayout,
        limits: Limits,
        device: torch.device,
        own: ResearchAttentionConfig,
        memory: DeviceMemory | None = None,
        shared_layers: frozenset[int] = frozenset(),
    ) -> None:
        """Asks for no memory yet.

        Args:
            layout: See the class.
            limits: Likewise.
            device: Likewise.
            own: The engine's own configuration.
            memory: Of another planner of the engine; None: as much as this one needs.
            shared_layers: Those that read another layer's cache.
        """
        self.layout = layout
        self.limits = limits
        self.device = device
        self.space = self._space(1, device)
        self._shared_layers = shared_layers
        self._own_json = config_to_json(own)
        self._lists = _lists_of(own) if limits.has_fast_path else []
        self.memory = memory or DeviceMemory(self._scratch_bytes(), device)
        self._configurations: dict[str, _Configuration] = {}
        self._is_reserved = False
        self._general: set[str] = set()  # lists of which the general path's memory is known

    def reserve(self, layer_index: int) -> None:
        """Asks for all memory of a layer, which others ask for as well: to keep, or for a moment.

        Args:
            layer_index: Of a layer that can have maskers.
        """
        if not self._is_reserved:
            self._is_reserved = True
            self._reserve_scratch()
            if self.limits.brings_maskers:
                self._take_memory(COSTLY_MASKERS, 0)
        configs = configs_of_layer(self._own_json, layer_index)
        if not configs or repr(configs) in self._general:
            return
        if self.attention(self._own_json, layer_index) is None:
            self._general.add(repr(configs))
            self._take_memory(self._own_json, layer_index)

    def _reserve_scratch(self) -> None:
        if self.limits.has_fast_path:
            for configs in self._lists:
                self._attention(self._own_json, configs)
            size = self.memory.scratch.nbytes
            logger.info("sparse attention: %.0f MiB of memory to select in", size / (1 << 20))

    def _take_memory(self, config_json: str, layer_index: int) -> None:
        take_memory(
            config_json,
            layer_index,
            self.layout.shape,
            self.limits.capacity,
            self.limits.max_tokens,
            self.device,
        )

    def attention(self, config_json: str, layer_index: int) -> DeviceAttention | None:
        """The fast path of a configuration in a layer that has maskers; None: the general path.

        Args:
            config_json: Of a request.
            layer_index: Of the attention layer.
        """
        of_layers = self._configuration(config_json).of_layers
        if layer_index not in of_layers:
            configs = configs_of_layer(config_json, layer_index)
            found = self._attention(config_json, configs)
            if found is not None and layer_index in self._shared_layers:
                found = self._of_shared_keys(config_json, found)
            of_layers[layer_index] = found
        return of_layers[layer_index]

    def _of_shared_keys(self, config_json: str, found: DeviceAttention) -> DeviceAttention | None:
        try:
            require_indices(found.paged, self.layout, is_shared=True)
        except Unsupported as reason:
            say_once(config_json, str(reason))
            return None
        return found

    def use(self, config_json: str, layers: Sequence[int]) -> LayerUse:
        """What some layers do with a configuration.

        Asked in each step for each of its configurations: what was not asked for long is forgotten.

        Args:
            config_json: Of a request.
            layers: Their indices.
        """
        configuration = self._configuration(config_json)
        key = tuple(layers)
        if key not in configuration.uses:
            configuration.uses[key] = self._use(config_json, layers)
        # Last place: used last. A step has no more of them than queries.
        self._configurations[config_json] = self._configurations.pop(config_json)
        most = max(_MOST_CONFIGURATIONS, 2 * self.limits.max_queries)
        while len(self._configurations) > most:
            oldest = next(name for name in self._configurations if name != self._own_json)
            del self._configurations[oldest]
        return configuration.uses[key]

    def _use(self, config_json: str, layers: Sequence[int]) -> LayerUse:
        masked = [layer for layer in layers if configs_of_layer(config_json, layer)]
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

    def _configuration(self, config_json: str) -> _Configuration:
        if config_json not in self._configurations:
            self._configurations[config_json] = _Configuration()
        return self._configurations[config_json]

    def _attention(
        self, config_json: str, configs: tuple[MaskerConfig, ...]
    ) -> DeviceAttention | None:
        if not self.limits.has_fast_path:
            return None
        attentions = self._configuration(config_json).attentions
        name = repr(configs)  # 1 is another size than 1.0, though equal
        if name not in attentions:
            try:
                attentions[name] = self._make(configs)
            except Unsupported as reason:
                say_once(config_json, str(reason))
                attentions[name] = None
        return attentions[name]

    def _make(self, configs: tuple[MaskerConfig, ...]) -> DeviceAttention:
        require_indices(device_maskers(configs, self.layout.shape), self.layout)
        queries = self._queries_within(self.memory.num_bytes, configs)
        if queries == 0:
            needed, there = self._bytes_of(configs, 1) >> 20, self.memory.num_bytes >> 20
            raise Unsupported(
                f"to select for one query takes {needed} MiB of memory, and there are {there}"
            )
        return DeviceAttention(configs, self._space(queries, self.device, self.memory))

    def _scratch_bytes(self) -> int:
        """What the engine's own lists take; those on the general path take nothing."""
        limits = self.limits
        sizes = [CLIENTS_BYTES] if limits.has_fast_path and limits.brings_maskers else []
        for configs in self._lists:
            with contextlib.suppress(Unsupported):
                queries = max(1, self._queries_within(BUDGET_BYTES, configs))
                sizes.append(self._bytes_of(configs, queries))
        return max(sizes, default=0)

    def _queries_within(self, budget: int, configs: Sequence[MaskerConfig]) -> int:
        return queries_within(
            budget, self.limits.max_queries, lambda queries: self._bytes_of(configs, queries)
        )

    def _bytes_of(self, configs: Sequence[MaskerConfig], queries: int) -> int:
        space = self._space(queries, torch.device("meta"))
        DeviceAttention(configs, space)
        return space.scratch_bytes

    def _space(
        self, max_queries: int, device: torch.device, memory: DeviceMemory | None = None
    ) -> DeviceSpace:
        limits = self.limits
        return DeviceSpace(
            self.layout.shape,
            max_queries,
            limits.capacity,
            limits.max_tokens,
            device,
            limits.max_sequences,
            memory,
        )


@dataclass
class _Configuration:
    """What is remembered of one: its lists of maskers (None: the general path), and their use."""

    attentions: dict[str, DeviceAttention | None] = field(default_factory=dict)
    of_layers: dict[int, DeviceAttention | None] = field(default_factory=dict)
    uses: dict[tuple[int, ...], LayerUse] = field(default_factory=dict)


def sequences_within(budget: int, most: int, layout: BlockLayout, num_layers: int) -> int:
    """Of how many sequences all layers can hold what they have learned; at least 1.

    Args:
        budget: Bytes, of each index.
        most: Sequences of a step.
        layout: Of the blocks.
        num_layers: That have indices, at least 1.
    """
    learned = [index for index in layout.indices if isinstance(index, LearnedIndex)]
    sizes = [4 * num_layers * index.state_width(layout.shape) for index in learned]
    return max(1, min([most, *[budget // size for size in sizes]]))


def _lists_of(own: ResearchAttentionConfig) -> list[tuple[MaskerConfig, ...]]:
    lists = (own.masker_configs, *own.layer_masker_configs.values())
    return [tuple(maskers) for maskers in lists if maskers]
