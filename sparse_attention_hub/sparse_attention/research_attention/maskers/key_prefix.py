"""What is learned from keys is learned from a prefix of the keys that a query sees.

Codebooks and means need many keys, and yet what a query selects may depend on nothing but the keys
it sees: not on how a prompt was cut into chunks, not on when a sequence was first asked. So they
are made from the first 2**n visible keys, with n as large as possible: redone each time a sequence
has doubled, the same for every query in between.
"""

from __future__ import annotations

import torch

from sparse_attention_hub.sparse_attention.visibility import visible_keys


def prefix_sizes(
    attention_mask: torch.Tensor | None, num_keys: int
) -> list[tuple[int, torch.Tensor | None]]:
    """Sizes of the prefixes, each with the queries that have it.

    Args:
        attention_mask: As in `visible_keys`; the query heads of a sequence must agree in it.
        num_keys: K.

    Returns:
        Pairs of a size and a boolean `(B, 1, Q, 1)`; None = all queries.
    """
    visible = visible_keys(attention_mask, num_keys)
    if visible is None:
        return [(1 << (num_keys.bit_length() - 1), None)]
    counts = visible[:, :1].sum(dim=-1, keepdim=True).clamp(min=1)
    sizes = 1 << (torch.frexp(counts.double()).exponent.long() - 1)
    distinct = sorted(set(sizes.flatten().tolist()))
    return [(size, sizes == size) for size in distinct]


def first_visible_keys(
    keys: torch.Tensor, attention_mask: torch.Tensor | None, count: int
) -> torch.Tensor:
    """The first `count` keys that a sequence's last query sees, `(B, G, count, D)`.

    Args:
        keys: `(B, G, K, D)`.
        attention_mask: As in `visible_keys`.
        count: At most K; a sequence with fewer visible keys is filled up with others.
    """
    visible = visible_keys(attention_mask, keys.shape[2])
    if visible is None:
        return keys[:, :, :count]
    last = visible[:, 0, -1].expand(keys.shape[0], -1)
    positions = (~last).to(torch.int8).sort(dim=-1, stable=True).indices[:, :count]
    index = positions[:, None, :, None].expand(-1, keys.shape[1], -1, keys.shape[3])
    return keys.gather(2, index)
