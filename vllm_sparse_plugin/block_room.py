"""Room for indices in the blocks that vLLM makes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from vllm_sparse_plugin import compat
from vllm_sparse_plugin.backend import SparseAttentionImpl
from vllm_sparse_plugin.paged.layout import BlockLayout, BlockShape
from vllm_sparse_plugin.paged.token_bytes import TokenNeed, shared_token_bytes

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import AttentionSpec


def with_room(
    spec: AttentionSpec, engine: VllmConfig, layout_of: Callable[[BlockShape], BlockLayout]
) -> AttentionSpec:
    """A specification with room for the index, in vLLM's own accounting; see `token_bytes`.

    Args:
        spec: Of a layer, as vLLM makes it.
        engine: See `compat.engine_of`.
        layout_of: The blocks of a layer that has an index.
    """

    def need(num_kv_heads: int, head_size: int, has_index: bool) -> TokenNeed:
        shape = compat.block_shape(spec, engine)
        shape = replace(shape, num_kv_heads=num_kv_heads, head_size=head_size)
        plain = shape.key_value_bytes
        return TokenNeed(
            num_kv_heads, plain, layout_of(shape).bytes_per_token if has_index else plain
        )

    layers = [
        need(layer.num_kv_heads, layer.head_size, layer.has_index)
        for layer in compat.implementations(engine).values()
        # Those that read another layer's cache have none.
        if isinstance(layer, SparseAttentionImpl) and not layer.kv_sharing_target_layer_name
    ]
    is_windowed = compat.window_restricts(getattr(spec, "sliding_window", None), engine)
    own = need(spec.num_kv_heads, spec.head_size, not is_windowed)
    return replace(spec, state_content_bytes=shared_token_bytes(own, layers))
