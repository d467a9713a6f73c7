"""Which way a request's maskers run in a layer: on pages, on gathered keys, or not at all."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Sequence

from sparse_attention_hub.sparse_attention.research_attention import ResearchAttentionConfig
from sparse_attention_hub.sparse_attention.research_attention.maskers.base import MaskerConfig
from vllm_sparse_plugin.masked_attention import attention_of
from vllm_sparse_plugin.paged.attention import PagedAttention, paged_maskers
from vllm_sparse_plugin.paged.layout import BlockIndex, BlockLayout, BlockShape
from vllm_sparse_plugin.paged.maskers.base import PagedMasker, Unsupported

logger = logging.getLogger(__name__)

MaskersOf = Callable[[Sequence[MaskerConfig], BlockShape], Sequence[PagedMasker]]
"""The counterparts of a list of maskers on some device."""


@functools.lru_cache(maxsize=4096)
def paged_attention_of(
    config_json: str, layout: BlockLayout, layer_index: int, is_shared: bool = False
) -> PagedAttention | None:
    """The fast path of a configuration in one layer; None: the general path serves it.

    The log says why not, once per configuration.

    Args:
        config_json: With maskers in this layer.
        layout: Of the layer's blocks.
        layer_index: Of the attention layer.
        is_shared: Whether they are another layer's.
    """
    try:
        attention = PagedAttention(configs_of_layer(config_json, layer_index), layout.shape)
        require_indices(attention.maskers, layout, is_shared)
    except Unsupported as reason:
        say_once(config_json, str(reason))
        return None
    return attention


def require_indices(
    maskers: Iterable[PagedMasker], layout: BlockLayout, is_shared: bool = False
) -> None:
    """Looks whether blocks hold what maskers need.

    Args:
        maskers: Of a layer.
        layout: Of its blocks.
        is_shared: Whether they are another layer's.

    Raises:
        Unsupported: They do not; says what is missing.
    """
    for index in (index for masker in maskers for index in masker.indices):
        if index not in layout.indices:
            raise Unsupported(
                f"the blocks hold no {index}; name its masker in the server's own "
                'configuration, or in its "index"'
            )
        if is_shared and not index.is_of_keys_alone:
            raise Unsupported(f"a layer reads another one's blocks, and their {index}")


@functools.lru_cache(maxsize=1024)
def say_once(config_json: str, reason: str) -> None:
    """Logs, once per configuration, why the general path serves it."""
    logger.warning(
        "sparse attention: the general path serves %s, slower than dense: %s", config_json, reason
    )


def configs_of_layer(config_json: str, layer_index: int) -> tuple[MaskerConfig, ...]:
    """The maskers of one layer; none where it is dense.

    Args:
        config_json: The maskers of all layers.
        layer_index: Of the attention layer.
    """
    maskers = attention_of(config_json).maskers_of_layer(layer_index)
    return tuple(masker.config for masker in maskers)


def is_dense_layer(config_json: str, layer_index: int) -> bool:
    """Whether a configuration leaves a layer dense."""
    return not attention_of(config_json).maskers_of_layer(layer_index)


def indices_of(
    configs: Iterable[ResearchAttentionConfig],
    shape: BlockShape,
    maskers_of: Callable[
        [Sequence[MaskerConfig], BlockShape], Sequence[PagedMasker]
    ] = paged_maskers,
) -> list[BlockIndex]:
    """What blocks must hold for some configurations to run on pages, each index once.

    Maskers that have no counterpart on such blocks need none: the general path serves them.

    Args:
        configs: Of the server.
        shape: Of the blocks.
        maskers_of: The counterparts of a list of maskers; raises `Unsupported` without one.
    """
    found: dict[BlockIndex, None] = {}
    for config in configs:
        for maskers in (config.masker_configs, *config.layer_masker_configs.values()):
            if not maskers:
                continue
            try:
                counterparts = maskers_of(maskers, shape)
            except Unsupported as reason:
                logger.warning("sparse attention: no index for %s: %s", maskers, reason)
                continue
            for masker in counterparts:
                found.update(dict.fromkeys(masker.indices))
    return list(found)
