"""Layers that a configuration names, and that cannot do what it says of them."""

from __future__ import annotations

from collections.abc import Set

from sparse_attention_hub.sparse_attention.research_attention import ResearchAttentionConfig


def named_in_vain(config: ResearchAttentionConfig, every: Set[int], sparse: Set[int]) -> str | None:
    """What to say of maskers for layers that stay dense, and of layers called dense that are none.

    Args:
        config: Of the attention.
        every: Layers with attention.
        sparse: Those of them that can be sparse.

    Returns:
        A warning; None: all that is said has an effect.
    """
    without = [
        *(layer for layer in config.layer_masker_configs if layer not in sparse),
        *(layer for layer in config.dense_layers if layer not in every),
    ]
    if not without:
        return None
    named, others = (", ".join(map(str, sorted(layers))) for layers in (without, sparse))
    return (
        f"sparse attention: the configuration says something of layers {named}, and changes "
        f"nothing there: attention can be sparse in layers {others}"
    )
