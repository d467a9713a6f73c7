"""The one attention function that transformers models call for sparse adapters.

It looks at a context variable for what to do: nothing there (another adapter, another thread,
a dense pass) means the model's usual attention, see `dense_attention`. So models are shared freely
between adapters, and no mode can leak from one to another.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask, sdpa_mask

from sparse_attention_hub.adapters.dense_attention import dense_attention
from sparse_attention_hub.adapters.sparse_layers import restricts
from sparse_attention_hub.sparse_attention.density import count_read_keys
from sparse_attention_hub.sparse_attention.research_attention import ResearchAttention
from sparse_attention_hub.sparse_attention.utils.mask_attention_utils import (
    get_masked_attention_output,
)

ATTENTION_NAME = "sparse_attention_hub"

_UNSUPPORTED = {
    "softcap": "a soft cap of scores",
    "position_bias": "a position bias",
}


@dataclass
class AttentionSession:
    """One stretch of sparse attention: a question and its answer.

    Attributes:
        attention: The adapter's.
        sparse_meta_data: The maskers' cache.
        read_keys: Keys read so far.
        visible_keys: Keys that a dense pass would have read.
    """

    attention: ResearchAttention
    sparse_meta_data: dict[Any, Any] = field(default_factory=dict)
    read_keys: int = 0
    visible_keys: int = 0

    @property
    def density(self) -> float:
        """Keys read / keys that a dense pass would have read; 1.0 before anything was."""
        return self.read_keys / self.visible_keys if self.visible_keys else 1.0

    def add_counts(self, counts: tuple[int, int]) -> None:
        """Adds what one attention call read and could have read."""
        self.read_keys += counts[0]
        self.visible_keys += counts[1]

    def attend(
        self,
        module: torch.nn.Module,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float,
        dropout: float,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Output of one layer, `(B, Q, H, D)`; arguments as in `SparseAttention`."""
        inputs = (queries, keys, values, attention_mask, scaling, dropout)
        sink_logits = kwargs.pop("s_aux", None)
        layer = getattr(module, "layer_idx", None)
        if layer is not None:
            kwargs["layer_idx"] = layer
        mask = self.attention.select(*inputs, self.sparse_meta_data, **kwargs)
        self.add_counts(count_read_keys(mask, attention_mask))
        output = get_masked_attention_output(module, *inputs, mask, sink_logits=sink_logits)
        self.attention.log_metrics(
            module, *inputs, mask, output, kwargs.get("layer_idx"), sink_logits
        )
        return output


_SESSION: ContextVar[AttentionSession | None] = ContextVar("attention_session", default=None)


@contextmanager
def attention_session(session: AttentionSession | None) -> Iterator[None]:
    """Makes `session` the running one for the `with` block; None = dense."""
    token = _SESSION.set(session)
    try:
        yield
    finally:
        _SESSION.reset(token)


def install(model: PreTrainedModel) -> None:
    """Makes a model call the function of this module; without a session it stays dense.

    Raises:
        ValueError: The model does not take its attention from transformers' registry.
    """
    AttentionInterface.register(ATTENTION_NAME, _attention)
    # Without a mask function of the same name, transformers passes no mask and padding is seen.
    AttentionMaskInterface.register(ATTENTION_NAME, _mask)
    if model.config._attn_implementation != ATTENTION_NAME:
        model.set_attn_implementation(ATTENTION_NAME)
    if model.config._attn_implementation != ATTENTION_NAME:
        raise ValueError(f"{type(model).__name__} does not support a custom attention function")


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    session = _SESSION.get()
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    inputs = (module, query, key, value, attention_mask, scaling, dropout)
    # Layers with a sliding window stay dense, as in the vLLM plugin.
    if session is None or restricts(kwargs.get("sliding_window"), module.config):
        return dense_attention(*inputs, **kwargs), None
    for name, what in _UNSUPPORTED.items():
        if kwargs.get(name) is not None:
            raise ValueError(f"sparse attention does not support {what} (layer {module})")
    return session.attend(*inputs, **kwargs), None


def _require_no_room(
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int | torch.Tensor = 0,
    **others: Any,
) -> None:
    """Looks whether the last key is the last query's own, as maskers take it to be.

    Args:
        q_length: Queries.
        kv_length: Keys that attention will see.
        q_offset: Of the first query in its sequence.
        kv_offset: Of the first key.
        others: Of a mask.

    Raises:
        ValueError: The cache has keys behind it, which are of no token yet.
    """
    keys, queries = int(kv_offset) + kv_length, int(q_offset) + q_length
    if keys != queries:
        raise ValueError(
            f"sparse attention needs caches that grow: one with room for {keys} keys was given "
            f"where there are {queries} (transformers' static caches are for dense passes)"
        )


def _mask(**arguments: Any) -> torch.Tensor | None:
    if _SESSION.get() is None:
        mask: torch.Tensor | None = sdpa_mask(**arguments)
        return mask
    _require_no_room(**arguments)
    # One query without padding sees every key: no mask at all, as the paged path has it.
    if arguments["q_length"] == 1 and sdpa_mask(**arguments) is None:
        return None
    additive: torch.Tensor = eager_mask(**arguments)
    return additive
