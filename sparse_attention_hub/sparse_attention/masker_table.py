"""The table of built-in maskers, as Markdown, made from the registry.

python -m sparse_attention_hub.sparse_attention.masker_table
"""

from __future__ import annotations

import sys

from sparse_attention_hub.sparse_attention.research_attention.maskers.base import (
    MaskerRegistry,
    json_name,
)
from sparse_attention_hub.sparse_attention.serialization import config_fields

_HEADER = (
    "masker",
    "fields",
    "paper",
    "selects per",
    "state it keeps",
    "index bytes per token and head",
    "decode step in process",
    "in vllm serve, CPUs",
)


def masker_table() -> str:
    """One row per registered masker that states its facts, in the order of registration."""
    rows = [_HEADER, tuple("---" for _ in _HEADER)]
    for config, masker in MaskerRegistry.get_all_registered_types().items():
        if masker.facts is None:
            continue
        fields = [field.name for field in config_fields(config)]
        pools = "head_granularity" in fields
        rows.append(
            (
                f"`{json_name(config)}`",
                ", ".join(f"`{name}`" for name in fields),
                masker.facts.paper,
                "query head or KV head" if pools else "query head",
                masker.facts.state,
                masker.facts.index_bytes,
                "by index" if masker.facts.is_by_index else "dense weights",
                "on pages" if masker.facts.is_paged else "general path",
            )
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    sys.stdout.write(masker_table() + "\n")
