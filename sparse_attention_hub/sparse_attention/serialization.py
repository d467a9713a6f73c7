"""Configurations as JSON: `{"maskers": [{"type": "sink", "sink_size": 128}, ...]}`.

`"dense_layers": [0, 1]` keeps layers dense, `"layers": {"5": [...]}` gives one its own maskers.

Every registered masker is readable and writable by its JSON name; nothing here names one.
`search_space` (for tuners) is not part of what a masker does, and is left out; weights of networks
are named by their file.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

# Registers the built-in maskers.
import sparse_attention_hub.sparse_attention.research_attention.maskers.fixed
import sparse_attention_hub.sparse_attention.research_attention.maskers.sampling  # noqa: F401
from sparse_attention_hub.sparse_attention.research_attention.base import ResearchAttentionConfig
from sparse_attention_hub.sparse_attention.research_attention.maskers.base import (
    MaskerConfig,
    MaskerRegistry,
    json_name,
)

CONFIG_FIELDS = ("maskers", "dense_layers", "layers")
"""Of a configuration in JSON; all but the first may be left out."""
_LEFT_OUT = ("search_space", "hat_weights")


def config_to_dict(config: ResearchAttentionConfig) -> dict[str, Any]:
    """A configuration as plain data, with every field written out."""
    data: dict[str, Any] = {"maskers": _maskers_to_list(config.masker_configs)}
    if config.dense_layers:
        data["dense_layers"] = list(config.dense_layers)
    if config.layer_masker_configs:
        data["layers"] = {
            str(layer): _maskers_to_list(maskers)
            for layer, maskers in config.layer_masker_configs.items()
        }
    return data


def _maskers_to_list(configs: Iterable[MaskerConfig]) -> list[dict[str, Any]]:
    return [_masker_to_dict(config) for config in configs]


def _masker_to_dict(config: MaskerConfig) -> dict[str, Any]:
    fields = {field.name: getattr(config, field.name) for field in config_fields(type(config))}
    if getattr(config, "hat_weights", None) is not None:
        raise ValueError("hat_weights cannot be written as JSON; use hat_weight_file")
    return {"type": json_name(type(config)), **fields}


def config_fields(config_type: type[MaskerConfig]) -> list[dataclasses.Field[Any]]:
    """The fields of a masker's configuration that JSON has."""
    return [field for field in dataclasses.fields(config_type) if field.name not in _LEFT_OUT]


def config_from_dict(data: object) -> ResearchAttentionConfig:
    """Reads what `config_to_dict` writes; fields with a default may be left out.

    Raises:
        ValueError: A type or field is unknown or missing, or a value is not allowed. The message
            says where, what was found and what is allowed.
    """
    if not isinstance(data, Mapping):
        raise ValueError(f'a configuration must be an object {{"maskers": [...]}}, got {data!r}')
    for name in data:
        if name not in CONFIG_FIELDS:
            raise ValueError(
                f"{name!r} is not a field of a configuration; {_allowed(name, CONFIG_FIELDS)}"
            )
    dense = data.get("dense_layers", [])
    if not isinstance(dense, list):
        raise ValueError(f'"dense_layers" must be a list of layer indices, got {dense!r}')
    layers = data.get("layers", {})
    if not isinstance(layers, Mapping) or not all(str(layer).isdecimal() for layer in layers):
        raise ValueError(f'"layers" must map layer indices to lists of maskers, got {layers!r}')
    if len({int(layer) for layer in layers}) < len(layers):
        raise ValueError(f'"layers" names a layer twice: {", ".join(map(str, layers))}')
    return ResearchAttentionConfig(
        maskers_from_list(data.get("maskers"), "maskers"),
        tuple(dense),
        {
            int(layer): maskers_from_list(maskers, f"layers[{layer}]")
            for layer, maskers in layers.items()
        },
    )


def maskers_from_list(data: object, where: str) -> list[MaskerConfig]:
    """Reads one list of maskers.

    Args:
        data: Of JSON.
        where: What the list is called in errors.

    Raises:
        ValueError: As `config_from_dict`.
    """
    if not isinstance(data, list):
        raise ValueError(f'"{where}" must be a list of objects, got {data!r}')
    return [_masker_from_dict(masker, f"{where}[{index}]") for index, masker in enumerate(data)]


def _masker_from_dict(data: object, where: str) -> MaskerConfig:
    if not isinstance(data, Mapping):
        raise ValueError(f'{where} must be an object with a "type", got {data!r}')
    types = MaskerRegistry.config_types()
    name = data.get("type")
    if not isinstance(name, str) or name not in types:
        raise ValueError(f"{where}.type {name!r} is not a masker; {_allowed(name, types)}")
    config_type = types[name]
    fields = {field.name: field for field in config_fields(config_type)}
    values = {field: value for field, value in data.items() if field != "type"}
    for field in values:
        if field not in fields:
            raise ValueError(
                f"{where}.{field} is not a field of {name!r}; {_allowed(field, fields)}"
            )
    for field, definition in fields.items():
        if field not in values and _is_required(definition):
            raise ValueError(f"{where}.{field} is missing; {name!r} needs it")
    try:
        return config_type(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where} ({name}): {error}") from error


def _is_required(field: dataclasses.Field[Any]) -> bool:
    missing = dataclasses.MISSING
    return field.default is missing and field.default_factory is missing


def _allowed(given: object, names: Iterable[str]) -> str:
    names = sorted(names)
    close = difflib.get_close_matches(str(given), names, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    return f"allowed: {', '.join(names) or 'none'}{hint}"


def config_to_json(config: ResearchAttentionConfig) -> str:
    """The canonical JSON text: equal configurations give equal texts."""
    return json.dumps(config_to_dict(config), sort_keys=True, separators=(",", ":"))


def config_from_json(text: str) -> ResearchAttentionConfig:
    """Reads JSON text.

    Raises:
        ValueError: It is not JSON, or not a configuration (see `config_from_dict`).
    """
    try:
        data = json.loads(text)
    except ValueError as error:
        raise ValueError(f"a configuration must be JSON: {error}") from error
    return config_from_dict(data)


def config_fingerprint(config: ResearchAttentionConfig) -> str:
    """16 hexadecimal digits that are the same for equal configurations, in every process."""
    return hashlib.sha256(config_to_json(config).encode()).hexdigest()[:16]
