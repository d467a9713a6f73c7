"""Keys under which model servers keep what they loaded."""

from __future__ import annotations

import hashlib
from typing import Any


def hash_kwargs(kwargs: dict[str, Any]) -> str:
    """8 hexadecimal digits that do not depend on the order of the arguments; "empty" for none."""
    if not kwargs:
        return "empty"
    text = str(sorted(kwargs.items(), key=lambda item: str(item[0])))
    return hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()[:8]


def generate_model_key(model_name: str, gpu_id: object, model_kwargs: dict[str, Any]) -> str:
    """`name|device|hash`."""
    device = "cpu" if gpu_id is None else gpu_id
    return f"{model_name}|{device}|{hash_kwargs(model_kwargs)}"


def generate_tokenizer_key(tokenizer_name: str, tokenizer_kwargs: dict[str, Any]) -> str:
    """`name|hash`."""
    return f"{tokenizer_name}|{hash_kwargs(tokenizer_kwargs)}"
