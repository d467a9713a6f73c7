"""The server-wide configuration, given to `vllm serve` with `--additional-config`."""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from sparse_attention_hub.sparse_attention.presets import PRESETS, get_preset, preset_from_dict
from sparse_attention_hub.sparse_attention.research_attention import ResearchAttentionConfig
from sparse_attention_hub.sparse_attention.serialization import (
    CONFIG_FIELDS,
    config_from_dict,
    config_to_dict,
    maskers_from_list,
)

NAMESPACE = "sparse_attention"
"""The key of `--additional-config` that holds this configuration."""

_FILE_SUFFIXES = (".json", ".yaml", ".yml")


@dataclass(frozen=True)
class ServingConfig:
    """What a server does with its requests, unless a request says otherwise.

    Attributes:
        attention: The maskers of sparse queries. No maskers = every request is dense.
        sparse_by_default: Whether a request that does not say is sparse.
        allow_request_config: Whether a request may bring maskers of its own.
        imports: Modules imported before `attention` is read, so that a user's own maskers are
            registered in every process of the server.
        request_files: Files that a request's maskers may name, besides those in `attention`.
        index: Maskers that requests may bring and that shall be fast: blocks hold what they need,
            besides what `attention` needs.
        fast_path: Whether maskers run on pages where they can; else on gathered keys, slowly, in
            the reference's own code.
        min_sparse_keys: Queries that see fewer keys than this attend densely, since maskers then
            cost more than they save; "auto" = the break-even of the server's maskers, measured: on
            CPUs a number of keys, on CUDA what each step costs either way (0 without the fast path,
            and on CPUs where maskers take the general path, which never saves anything).
    """

    attention: ResearchAttentionConfig
    sparse_by_default: bool = True
    allow_request_config: bool = True
    imports: tuple[str, ...] = ()
    request_files: tuple[str, ...] = ()
    index: ResearchAttentionConfig = field(default_factory=lambda: ResearchAttentionConfig([]))
    fast_path: bool = True
    min_sparse_keys: int | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        """Checks the types, since the values come from JSON."""
        for name in ("sparse_by_default", "allow_request_config", "fast_path"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise ValueError(f"{NAMESPACE}.{name} must be true or false, got {value!r}")
        least = self.min_sparse_keys
        if least != "auto" and (isinstance(least, bool) or not isinstance(least, int) or least < 0):
            raise ValueError(
                f'{NAMESPACE}.min_sparse_keys must be an integer >= 0 or "auto", got {least!r}'
            )

    @classmethod
    def parse(cls, value: object) -> ServingConfig:
        """Reads an object, a preset's name, or the path of a JSON or YAML file.

        Args:
            value: What stands under `"sparse_attention"` in `--additional-config`.

        Raises:
            ValueError: Names the field, its value and what is allowed.
        """
        if isinstance(value, str):
            if value.endswith(_FILE_SUFFIXES):
                return cls.parse(_read_file(Path(value)))
            return cls(attention=_named(get_preset, value))
        if not isinstance(value, Mapping):
            raise ValueError(
                f"--additional-config needs the key {NAMESPACE!r} when --attention-backend is "
                f"CUSTOM: a preset ({', '.join(sorted(PRESETS))}), the path of a .json or .yaml "
                f'file, or an object such as {{"maskers": [{{"type": "sink", "sink_size": 4}}]}}; '
                f"got {value!r}"
            )
        return cls._from_mapping(value)

    @classmethod
    def _from_mapping(cls, value: Mapping[str, Any]) -> ServingConfig:
        options = {field.name for field in dataclasses.fields(cls)} - {"attention"}
        allowed = {*CONFIG_FIELDS, "preset", "set", *options}
        unknown = sorted(set(value) - allowed)
        if unknown:
            raise ValueError(
                f"{NAMESPACE}.{unknown[0]} is not a field; allowed: {', '.join(sorted(allowed))}"
            )
        if ("maskers" in value) == ("preset" in value):
            raise ValueError(
                f'{NAMESPACE} needs exactly one of "maskers" and "preset", got {dict(value)!r}'
            )
        misplaced = ["set"] if "maskers" in value else list(CONFIG_FIELDS)
        for name in misplaced:
            if name in value:
                raise ValueError(
                    f"{NAMESPACE}.{name} does not go with "
                    f'"{"maskers" if name == "set" else "preset"}"; a preset\'s fields are changed '
                    'by "set": {"MASKER.FIELD": VALUE, "dense_layers": [...]}'
                )
        imports = _names(value, "imports", "module names")
        request_files = _names(value, "request_files", "paths")
        for name in imports:
            _import(name)
        if "preset" in value:
            attention = _named(preset_from_dict, value)
        else:
            attention = _named(
                config_from_dict, {name: value[name] for name in CONFIG_FIELDS if name in value}
            )
        for path in request_files:
            if not Path(path).is_file():
                raise ValueError(f"{NAMESPACE}.request_files: there is no file {path!r}")
        index = _named(_index_from_list, value.get("index", []))
        read: dict[str, Any] = {
            "imports": imports,
            "request_files": request_files,
            "index": index,
        }
        plain = {name: value[name] for name in options - set(read) if name in value}
        return cls(attention=attention, **read, **plain)

    @property
    def is_automatic(self) -> bool:
        """Whether `min_sparse_keys` is to be found out: "auto", for maskers on the fast path."""
        is_paged = self.fast_path and not self.attention.is_dense
        return self.min_sparse_keys == "auto" and is_paged

    def indexed(self) -> list[ResearchAttentionConfig]:
        """What blocks hold an index for: `attention`, and each masker of `index` by itself."""
        alone = [ResearchAttentionConfig([masker]) for masker in self.index.masker_configs]
        return [self.attention, *alone]

    def to_dict(self) -> dict[str, Any]:
        """The JSON form, which `parse` reads back to an equal object."""
        return {
            **config_to_dict(self.attention),
            "sparse_by_default": self.sparse_by_default,
            "allow_request_config": self.allow_request_config,
            "imports": list(self.imports),
            "request_files": list(self.request_files),
            "index": config_to_dict(self.index)["maskers"],
            "fast_path": self.fast_path,
            "min_sparse_keys": self.min_sparse_keys,
        }


def _names(value: Mapping[str, Any], field: str, what: str) -> tuple[str, ...]:
    names = value.get(field, [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{NAMESPACE}.{field} must be a list of {what}, got {names!r}")
    return tuple(names)


def _import(name: str) -> None:
    where = f"{NAMESPACE}.imports: cannot import {name!r}"
    if not all(name.split(".")):
        raise ValueError(f"{where}: that is no module's name")
    try:
        importlib.import_module(name)
    except Exception as error:  # the module is the user's, and may raise anything
        hint = ""
        if isinstance(error, ModuleNotFoundError) and f"{name}.".startswith(f"{error.name}."):
            hint = (
                " (modules are looked for in PYTHONPATH and among installed packages, not in the "
                "current folder)"
            )
        raise ValueError(f"{where}: {type(error).__name__}: {error}{hint}") from error


def _index_from_list(value: object) -> ResearchAttentionConfig:
    return ResearchAttentionConfig(maskers_from_list(value, "index"))


def _named(read: Any, value: Any) -> ResearchAttentionConfig:
    try:
        config: ResearchAttentionConfig = read(value)
    except ValueError as error:
        raise ValueError(f"{NAMESPACE}: {error}") from error
    return config


def _read_file(path: Path) -> object:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{NAMESPACE}: cannot read the configuration file {path}: {error}"
        ) from error
    try:
        if path.suffix == ".json":
            content: object = json.loads(text)
        else:
            import yaml  # vLLM depends on it; only needed for YAML files

            content = yaml.safe_load(text)
    except ValueError as error:
        raise ValueError(f"{NAMESPACE}: {path} is not valid JSON: {error}") from error
    except Exception as error:
        raise ValueError(f"{NAMESPACE}: {path} is not valid YAML: {error}") from error
    if not isinstance(content, Mapping):
        # A file that names a file or a preset would hide where the configuration comes from.
        raise ValueError(f"{NAMESPACE}: {path} must hold an object, got {type(content).__name__}")
    return content
