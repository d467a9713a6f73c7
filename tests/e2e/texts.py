"""Prompts: real text, as tokens, of any length and each its own."""

from functools import cache
from pydoc_data.topics import topics

from transformers import AutoTokenizer

CHAPTERS = ("string-methods", "formatstrings", "attribute-access", "customization", "debugger")


@cache
def _all_tokens(model_path: str) -> list[int]:
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    return tokenizer.encode("\n".join(topics[chapter] for chapter in CHAPTERS))


def prompt(model_path: str, start: int, length: int) -> list[int]:
    """Some tokens of the manual; another start shares no leading block."""
    tokens = _all_tokens(model_path)[start : start + length]
    assert len(tokens) == length
    return tokens
