"""Replacing functions of vLLM by wrappers of them, once per process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

MARK = "_sparse_attention_hook"
"""Attribute of a replacement: loading the plugin again must not wrap it again."""


def replace_once(owner: Any, name: str, wrap: Callable[[Any], Any]) -> None:
    """Replaces `owner.name` by `wrap(original)`, unless that was done before."""
    original = getattr(owner, name)
    if getattr(original, MARK, False):
        return
    replacement = wrap(original)
    setattr(replacement, MARK, True)
    setattr(owner, name, replacement)
