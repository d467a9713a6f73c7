"""Configurations with a name, each field of which can be set to something else.

A preset is written like a configuration in JSON. What it leaves open (files that belong to a model)
must be set by whoever uses it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from sparse_attention_hub.sparse_attention.research_attention.base import ResearchAttentionConfig
from sparse_attention_hub.sparse_attention.serialization import config_from_dict

# The query heads of a KV head select together, so that what they read is loaded once for all. It
# costs accuracy: on the small model of the tests (4,146 tokens, 10 % of the keys), the relative
# output error of Double Sparsity grew from 0.068 to 0.071, that of PQCache from 0.059 to 0.065. On
# an H200 it made Double Sparsity 2.7 to 3.4 times as fast, which was slower than dense without.
_BY_GROUP: Mapping[str, Any] = {"head_granularity": "kv_head"}
_SINK_LOCAL = ({"type": "sink", "sink_size": 16}, {"type": "local", "window_size": 64})
_ADAPTIVE = {
    "type": "adaptive_sampling",
    "base_rate_sampling": 0.02,
    "epsilon": 0.1,
    "delta": 0.1,
    "init_offset": 0,
    "local_offset": 0,
    **_BY_GROUP,
}


def _quest(heavy_size: float, page_size: int, label_bits: int) -> dict[str, Any]:
    return {
        "type": "quest_top_k",
        "heavy_size": heavy_size,
        "page_size": page_size,
        "label_bits": label_bits,
        **_BY_GROUP,
    }


PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        # StreamingLLM (Xiao et al. 2023): 4 sinks, the rest of a 1,024-token cache is recent.
        "streaming-llm": {
            "maskers": [{"type": "sink", "sink_size": 4}, {"type": "local", "window_size": 1020}]
        },
        # What exact top-k heavy hitters can reach, each head for itself: an upper bound to study,
        # not a way to be fast.
        "sink-local-oracle": {
            "maskers": [
                {"type": "sink", "sink_size": 128},
                {"type": "local", "window_size": 128},
                {"type": "oracle_top_k", "heavy_size": 0.1},
            ]
        },
        # The best at 10 % of the keys, of those that need no file of the model's, on the small
        # model of the tests (5,000 tokens, mean relative output error): pages of 8 with 4-bit
        # bounds 0.117, of 16 with 8-bit bounds 0.138, half of it sampled 0.22 to 0.27, a window
        # alone 0.294. The first layer lost twice as much as the others, and is dense.
        "balanced": {"maskers": [*_SINK_LOCAL, _quest(0.08, 8, 4)], "dense_layers": [0]},
        # Quest (Tang et al. 2024): pages of 16; the first two layers are dense, as in the paper.
        "quest": {"maskers": [*_SINK_LOCAL, _quest(0.08, 16, 8)], "dense_layers": [0, 1]},
        # Double Sparsity (Yang et al. 2024); channels from `calibrate_channels`.
        "double-sparsity": {
            "maskers": [
                *_SINK_LOCAL,
                {
                    "type": "double_sparsity_top_k",
                    "heavy_size": 0.08,
                    "group_factor": 8,
                    **_BY_GROUP,
                },
            ]
        },
        # HashAttention (Desai et al. 2024); networks that were trained for the model.
        "hash-attention": {
            "maskers": [
                *_SINK_LOCAL,
                {
                    "type": "hash_attention_top_k",
                    "heavy_size": 0.08,
                    "hat_bits": 32,
                    "hat_mlp_layers": 3,
                    "hat_mlp_hidden_size": 128,
                    "hat_mlp_activation": "silu",
                    **_BY_GROUP,
                },
            ]
        },
        # PQCache (Zhang et al. 2024).
        "pq": {
            "maskers": [
                *_SINK_LOCAL,
                {
                    "type": "pq_cache",
                    "heavy_size": 0.08,
                    "pq_sub_dim": 16,
                    "pq_bits": 6,
                    **_BY_GROUP,
                },
            ]
        },
        # MagicPIG (Chen et al. 2024): 10 bits, 150 tables; the first layers are dense there too.
        "magic-pig": {
            "maskers": [*_SINK_LOCAL, {"type": "magic_pig", "lsh_l": 150, "lsh_k": 10}],
            "dense_layers": [0],
        },
        # vAttention (Desai et al. 2025), over Quest's pages instead of an oracle.
        "vattention": {"maskers": [*_SINK_LOCAL, _quest(0.05, 16, 8), _ADAPTIVE]},
    }
)
"""By name, as `config_from_dict` reads them; `get_preset` has the better errors."""


def get_preset(name: str, fields: Mapping[str, Any] | None = None) -> ResearchAttentionConfig:
    """The configuration of a preset.

    Args:
        name: A key of `PRESETS`.
        fields: What shall be otherwise: "dense_layers", or "MASKER.FIELD" such as
            "quest_top_k.heavy_size".

    Raises:
        ValueError: There is no such preset, masker or field, a value is not allowed, or a field
            that the preset leaves open is missing; the message lists what there is.
    """
    preset = PRESETS.get(name) if isinstance(name, str) else None
    if preset is None:
        raise ValueError(f"{name!r} is not a preset; allowed: {', '.join(sorted(PRESETS))}")
    data: dict[str, Any] = copy.deepcopy(dict(preset))
    maskers = {masker["type"]: masker for masker in data["maskers"]}
    for field, value in (fields or {}).items():
        kind, _, member = field.partition(".")
        if field == "dense_layers":
            data[field] = value
        elif kind in maskers and member:
            maskers[kind][member] = value
        else:
            raise ValueError(
                f"{field!r} is not a field of the preset {name!r}; allowed: dense_layers, "
                + ", ".join(f"{kind}.FIELD" for kind in sorted(maskers))
            )
    try:
        return config_from_dict(data)
    except ValueError as error:
        raise ValueError(f"preset {name!r}: {error}") from error


def preset_from_dict(data: Mapping[str, Any]) -> ResearchAttentionConfig:
    """Reads `{"preset": NAME, "set": {"MASKER.FIELD": VALUE}}`; see `get_preset`.

    Args:
        data: Other keys are not looked at.

    Raises:
        ValueError: See `get_preset`; or "set" is no object.
    """
    fields = data.get("set", {})
    if not isinstance(fields, Mapping):
        raise ValueError(f'"set" must be an object of fields and values, got {fields!r}')
    return get_preset(data["preset"], fields)
