"""How many bytes a kernel has to move: what its time is compared with.

Counted is what it cannot do without: each input once, each output once. What it reads twice, or
lays down in between, is not counted.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Heads:
    """Of an attention layer.

    Attributes:
        query_heads: Of a token.
        kv_heads: Of a token.
        head_size: Channels of a key.
        element_bytes: Of a query, a key, a value or an output.
    """

    query_heads: int
    kv_heads: int
    head_size: int
    element_bytes: int

    @property
    def key_value_bytes(self) -> int:
        """Of a token, per KV head."""
        return 2 * self.head_size * self.element_bytes

    @property
    def query_bytes(self) -> int:
        """Of a token, of all query heads; so has its output."""
        return self.query_heads * self.head_size * self.element_bytes


def gather_bytes(heads: Heads, batch: int, listed: int) -> int:
    """Of attention over lists: the listed keys and values, the lists, queries and outputs.

    Args:
        heads: Of the layer.
        batch: Queries.
        listed: Tokens of all lists together, a list per query and KV head.
    """
    return listed * (heads.key_value_bytes + 4) + 2 * batch * heads.query_bytes


def page_scan_bytes(heads: Heads, batch: int, keys: int, page_size: int, record_bytes: int) -> int:
    """Of scores of whole pages: their records, the queries, and a float32 per query head and page.

    Args:
        heads: Of the layer.
        batch: Queries.
        keys: Of each, a multiple of the page size.
        page_size: Keys of a page.
        record_bytes: Of a page's record, per KV head.
    """
    pages = keys // page_size
    records = pages * heads.kv_heads * record_bytes
    return batch * (records + 4 * pages * heads.query_heads + heads.query_bytes)


def index_share(record_bytes: int, keys: int, key_value_bytes: int) -> float:
    """Bytes of an index that is read whole, per byte of keys and values.

    Args:
        record_bytes: Of one record, per KV head.
        keys: Of one record.
        key_value_bytes: Of one token, per KV head.
    """
    return record_bytes / (keys * key_value_bytes)


def ceiling(share: float, density: float, index: float) -> float:
    """The largest speed-up of a step: what reads no keys takes as long as before.

    Args:
        share: Of the dense step's time, in which it reads keys and values (a).
        density: Of the keys that are read (d).
        index: See `index_share`.
    """
    return 1 / ((1 - share) + share * (density + index))
