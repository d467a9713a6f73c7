"""Per-request parameters: what an OpenAI body's `vllm_xargs` may say, and what it comes to.

They are resolved once, at admission in the API server, to one flat record under `RESOLVED`, which
travels with the request to the scheduler (block hashes) and the worker (masks). Those two never
look at the raw values, so they cannot disagree.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sparse_attention_hub.sparse_attention.presets import PRESETS, get_preset, preset_from_dict
from sparse_attention_hub.sparse_attention.research_attention import ResearchAttentionConfig
from sparse_attention_hub.sparse_attention.research_attention.maskers.sizes import (
    check_not_too_large,
)
from sparse_attention_hub.sparse_attention.serialization import (
    config_fingerprint,
    config_from_json,
    config_to_json,
)
from vllm_sparse_plugin.serving_config import ServingConfig

MODE = "sparse_attention"
DENSE_PREFIX = "sparse_attention_dense_prefix"
CONFIG = "sparse_attention_config"
TAG = "sparse_attention_tag"
MIN_KEYS = "sparse_attention_min_keys"
RESOLVED = "sparse_attention_resolved"

MOST_CHARACTERS = 1 << 16
"""Of a request's maskers as JSON."""
MOST_MASKERS = 16
"""Of a request, in any one layer."""
MOST_MASKERS_OF_LAYERS = 256
"""Of a request, in all lists together: they are tried before the request is admitted."""

_ALLOWED = (MODE, DENSE_PREFIX, CONFIG, TAG, MIN_KEYS)
_SHOWN_CHARACTERS = 600
"""Of an error with what a client sent in it, and at its end what is allowed."""
_TAG_PATTERN = re.compile(r"[A-Za-z0-9._-]{1,64}")
_MODES: Mapping[object, bool] = {"on": True, "off": False, True: True, False: False}


@dataclass(frozen=True)
class RequestParameters:
    """What one request's attention does, after defaults.

    Attributes:
        config_json: The maskers as JSON; None = every query is dense.
        fingerprint: Of the maskers; empty when dense.
        dense_prefix: Leading tokens whose queries attend densely; None = the whole prompt.
        tag: The name under which the measured density can be asked for, if any.
        min_sparse_keys: Queries that see fewer keys attend densely, whatever the prefix.
        is_automatic: Whether other queries too attend densely, in steps that take less time so:
            see `automatic_rows`.
    """

    config_json: str | None
    fingerprint: str
    dense_prefix: int | None
    tag: str | None
    min_sparse_keys: int = 0
    is_automatic: bool = False

    def asked_prefix_tokens(self, num_prompt_tokens: int) -> int:
        """The dense prefix that was asked for, for a prompt of this many tokens."""
        return num_prompt_tokens if self.dense_prefix is None else self.dense_prefix

    def dense_prefix_tokens(self, num_prompt_tokens: int) -> int:
        """Leading tokens whose queries attend densely, for a prompt of this many tokens."""
        return max(self.asked_prefix_tokens(num_prompt_tokens), self.min_sparse_keys - 1)

    @classmethod
    def from_extra_args(cls, extra_args: Mapping[str, Any] | None) -> RequestParameters | None:
        """Reads the resolved record back; None for a plain dense request.

        Args:
            extra_args: `SamplingParams.extra_args` in any process after admission, where the
                record may have become a plain mapping on its way.
        """
        record = (extra_args or {}).get(RESOLVED)
        if record is None or isinstance(record, cls):
            return record
        return cls(**record)


def resolve_request(
    extra_args: dict[str, Any] | None,
    server: ServingConfig | None,
    break_even: int = 0,
    steps_decide: bool = False,
) -> dict[str, Any] | None:
    """Checks a request's parameters and adds their resolved record.

    Args:
        extra_args: `SamplingParams.extra_args` as the client sent it; not modified.
        server: The server's configuration; None when the plugin is not selected.
        break_even: Keys from which on the server's own maskers are worth their cost, for
            `ServingConfig.min_sparse_keys`. A request's own maskers run from the first key on.
        steps_decide: Whether workers decide so in each step, for queries of as many keys or more.

    Returns:
        `extra_args` itself for a plain dense request, else a copy with the record.

    Raises:
        ValueError: Names the parameter, its value and what is allowed.
    """
    given = {name: value for name, value in (extra_args or {}).items() if name.startswith(MODE)}
    if isinstance(given.get(RESOLVED), RequestParameters):
        # The caller reuses one SamplingParams object for several requests.
        del given[RESOLVED]
        extra_args = {name: value for name, value in (extra_args or {}).items() if name != RESOLVED}
    for name in given:
        if name not in _ALLOWED:
            raise ValueError(
                f"vllm_xargs.{_shown(name)} is not known; allowed: {', '.join(_ALLOWED)}"
            )
    if server is None:
        if given:
            raise ValueError(
                f"vllm_xargs.{_shown(next(iter(given)))} needs a server that was started with "
                "--attention-backend CUSTOM; this one was not"
            )
        return extra_args
    parameters = _parameters(given, server, break_even, steps_decide)
    if parameters.config_json is None and parameters.tag is None:
        return extra_args
    return {**(extra_args or {}), RESOLVED: parameters}


def _parameters(
    given: Mapping[str, Any], server: ServingConfig, break_even: int, steps_decide: bool
) -> RequestParameters:
    mode = _mode(given[MODE]) if MODE in given else server.sparse_by_default
    config = _config(given[CONFIG], server) if CONFIG in given else server.attention
    dense_prefix = None
    if DENSE_PREFIX in given:
        dense_prefix = _count(DENSE_PREFIX, given[DENSE_PREFIX], "leading tokens")
    tag = _tag(given[TAG]) if TAG in given else None
    least, is_automatic = server.min_sparse_keys, False
    if MIN_KEYS in given:
        least = _count(MIN_KEYS, given[MIN_KEYS], "keys")
    elif least == "auto":
        least = 0 if CONFIG in given else break_even
        is_automatic = steps_decide and CONFIG not in given
    if not mode or config.is_dense:
        return RequestParameters(None, "", None, tag)
    return RequestParameters(
        config_json=config_to_json(config),
        fingerprint=config_fingerprint(config),
        dense_prefix=dense_prefix,
        tag=tag,
        min_sparse_keys=least,
        is_automatic=is_automatic,
    )


def _mode(value: object) -> bool:
    if isinstance(value, (str, int)) and value in _MODES:
        return _MODES[value]
    raise ValueError(f'vllm_xargs.{MODE} must be "on" or "off", got {_shown(repr(value))}')


def _count(name: str, value: object, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(
            f"vllm_xargs.{name} must be an integer >= 0 ({what}), got {_shown(repr(value))}"
        )
    check_not_too_large(f"vllm_xargs.{name}", value)
    return value


def _tag(value: object) -> str:
    if not isinstance(value, str) or not _TAG_PATTERN.fullmatch(value):
        raise ValueError(
            f"vllm_xargs.{TAG} must match {_TAG_PATTERN.pattern}, got {_shown(repr(value))}"
        )
    return value


def _config(value: object, server: ServingConfig) -> ResearchAttentionConfig:
    if not server.allow_request_config:
        raise ValueError(
            f"vllm_xargs.{CONFIG} is switched off on this server (allow_request_config is false)"
        )
    if not isinstance(value, str):
        raise ValueError(
            f"vllm_xargs.{CONFIG} must be a preset ({', '.join(sorted(PRESETS))}) or maskers as "
            f"one JSON string, got {_shown(repr(value))}"
        )
    if len(value) > MOST_CHARACTERS:
        raise ValueError(
            f"vllm_xargs.{CONFIG} must have at most {MOST_CHARACTERS} characters, got {len(value)}"
        )
    if not value.lstrip().startswith("{"):
        return _named(get_preset, value)
    _check_files(value, server)
    config = _named(_config_or_preset, value)
    for maskers in (config.masker_configs, *config.layer_masker_configs.values()):
        if len(maskers) > MOST_MASKERS:
            raise ValueError(
                f"vllm_xargs.{CONFIG} must have at most {MOST_MASKERS} maskers in a layer, got "
                f"{len(maskers)}"
            )
    together = len(config.all_masker_configs())
    if together > MOST_MASKERS_OF_LAYERS:
        raise ValueError(
            f"vllm_xargs.{CONFIG} must have at most {MOST_MASKERS_OF_LAYERS} maskers in all layers "
            f"together, got {together}"
        )
    return config


def _config_or_preset(text: str) -> ResearchAttentionConfig:
    try:
        data = json.loads(text)
    except ValueError:
        data = None  # the reader's error is the better one
    if isinstance(data, Mapping) and "preset" in data:
        for name in data:
            if name not in ("preset", "set"):
                raise ValueError(f"{name!r} does not go with a preset; allowed: preset, set")
        return preset_from_dict(data)
    return config_from_json(text)


def _named(read: Callable[[str], ResearchAttentionConfig], value: str) -> ResearchAttentionConfig:
    try:
        return read(value)
    except ValueError as error:
        raise ValueError(f"vllm_xargs.{CONFIG}: {_shown(str(error))}") from error


def _shown(text: str) -> str:
    half = _SHOWN_CHARACTERS // 2
    return text if len(text) <= 2 * half else f"{text[:half]} ... {text[-half:]}"


def _check_files(text: str, server: ServingConfig) -> None:
    """Lets a request name only files that the server's own configuration names.

    Before anything is read: a request must not make the server open files of its choice.
    """
    allowed = {
        value
        for config in (
            *server.attention.all_masker_configs(),
            *server.index.all_masker_configs(),
        )
        for name, value in vars(config).items()
        if name.endswith("_file")
    }
    allowed.update(server.request_files)

    refused: list[tuple[str, Any]] = []

    def look(members: list[tuple[str, Any]]) -> dict[str, Any]:
        for name, value in members:
            is_file = name.endswith("_file") and value is not None
            if is_file and not (isinstance(value, str) and value in allowed):
                refused.append((name, value))
        return dict(members)

    try:
        json.loads(text, object_pairs_hook=look)
    except json.JSONDecodeError:
        return  # the reader's error is the better one
    except ValueError as error:  # a number of more digits than Python reads
        raise ValueError(f"vllm_xargs.{CONFIG}: {error}") from error
    except RecursionError as error:
        raise ValueError(f"vllm_xargs.{CONFIG} is nested too deeply") from error
    for name, value in refused:
        raise ValueError(
            f"vllm_xargs.{CONFIG}: {_shown(name)} must be a file that the server's own "
            f"configuration names, got {_shown(repr(value))}"
        )
