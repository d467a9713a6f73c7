"""How many bytes a token has in each layer, for blocks of all layers to be equally large.

vLLM makes them so where layers with a window have caches of another size than others (Gemma 4): a
layer with a half of the bytes gets twice the tokens. Indices are no such parts of each other, so
tokens of some layers get a few bytes more than they need.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

_UNIT = 4
"""What a token's bytes are a multiple of: every block and head is aligned then."""


@dataclass(frozen=True)
class TokenNeed:
    """What a token takes in a layer.

    Attributes:
        num_kv_heads: Of the layer.
        plain: Bytes of a key and a value.
        needed: The same with its part of the index, if the layer has one.
    """

    num_kv_heads: int
    plain: int
    needed: int


def shared_token_bytes(own: TokenNeed, layers: Iterable[TokenNeed]) -> int:
    """Bytes per token and KV head, at least those that are needed.

    Where all layers have an index, or none has, vLLM's own ways do.

    Args:
        own: Of a layer.
        layers: Of all layers of the engine, it may be among them.

    Raises:
        ValueError: Keys and values of some layers are no whole part of others'. A block that
            changes hands would bring an index where another layer has values.
    """
    every = {own, *layers}
    has_index = {need.needed > need.plain for need in every}
    if len(has_index) == 1:
        return own.needed
    largest = max(need.num_kv_heads * need.plain for need in every)
    if any(largest % (need.num_kv_heads * need.plain) for need in every):
        sizes = sorted(need.num_kv_heads * need.plain for need in every)
        raise ValueError(
            "--attention-backend CUSTOM (sparse attention): layers with a window have caches of "
            f"another size than others, and not twice, three times (...) as large: {sizes} bytes "
            "per token; maskers that need an index are not supported"
        )

    def cells_of(need: TokenNeed) -> int:
        """KV heads of as many of its tokens as are beside one token of the largest layer."""
        return largest // (need.num_kv_heads * need.plain) * need.num_kv_heads

    cells = {need: cells_of(need) for need in every}
    shared = max(count * need.needed for need, count in cells.items())
    unit = math.lcm(*(count * _UNIT for count in cells.values()))
    return -(-shared // unit) * unit // cells[own]
