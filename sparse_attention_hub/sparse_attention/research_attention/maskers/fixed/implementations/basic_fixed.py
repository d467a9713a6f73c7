"""Sink, local and causal maskers under the module path of the field's API."""

from .causal import CausalMasker
from .local import LocalMasker, LocalMaskerConfig
from .sink import SinkMasker, SinkMaskerConfig

__all__ = [
    "CausalMasker",
    "LocalMasker",
    "LocalMaskerConfig",
    "SinkMasker",
    "SinkMaskerConfig",
]
