"""The base of all maskers, and the registry that finds them by configuration or JSON name."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch

from sparse_attention_hub.sparse_attention.utils.mask import Mask
from sparse_attention_hub.sparse_attention.visibility import visible_keys


@dataclass(frozen=True)
class MaskerConfig:
    """Base of all maskers' configurations.

    Attributes:
        json_name: The name in JSON, of the class that sets it: its subclasses do not inherit it.
            Without one, the class name without "MaskerConfig" or "Config", in snake case.
    """

    json_name: ClassVar[str | None] = None


@dataclass(frozen=True)
class AttentionTensorDimensions:
    """Sizes of one attention call.

    Attributes:
        batch_size: B.
        num_heads: Query heads H.
        seq_len_queries: Q.
        seq_len_keys: K.
    """

    batch_size: int
    num_heads: int
    seq_len_queries: int
    seq_len_keys: int

    @classmethod
    def of(cls, queries: torch.Tensor, keys: torch.Tensor) -> AttentionTensorDimensions:
        """Of `queries` `(B, H, Q, D)` and `keys` `(B, G, K, D)`."""
        return cls(queries.shape[0], queries.shape[1], queries.shape[2], keys.shape[2])


Masker = TypeVar("Masker", bound="type[ResearchMasker]")


class MaskerRegistry:
    """Which masker class a configuration class belongs to."""

    _maskers: ClassVar[dict[type[MaskerConfig], type[ResearchMasker]]] = {}
    _names: ClassVar[dict[str, type[MaskerConfig]]] = {}

    @classmethod
    def register(cls, config_type: type[MaskerConfig]) -> Callable[[Masker], Masker]:
        """Class decorator: the masker is built from `config_type`, exactly.

        From then on the masker is usable by its JSON name, in process and in `vllm serve`.

        Raises:
            ValueError: Another configuration class has the same JSON name.
        """

        def decorate(masker_class: Masker) -> Masker:
            name = json_name(config_type)
            other = cls._names.get(name, config_type)
            # The same class, loaded again from its file, may replace itself.
            if (other.__module__, other.__qualname__) != (
                config_type.__module__,
                config_type.__qualname__,
            ):
                raise ValueError(
                    f"the masker name {name!r} of {config_type.__qualname__} is taken by "
                    f"{other.__module__}.{other.__qualname__}; set json_name on the new one"
                )
            cls._maskers.pop(other, None)
            cls._names[name] = config_type
            cls._maskers[config_type] = masker_class
            return masker_class

        return decorate

    @classmethod
    def get_masker_class(cls, config_type: type[MaskerConfig]) -> type[ResearchMasker]:
        """The masker class of a configuration class.

        Raises:
            ValueError: None is registered.
        """
        if config_type not in cls._maskers:
            raise ValueError(
                f"no masker is registered for {config_type.__name__}; registered: "
                + ", ".join(sorted(config.__name__ for config in cls._maskers))
            )
        return cls._maskers[config_type]

    @classmethod
    def get_all_registered_types(cls) -> dict[type[MaskerConfig], type[ResearchMasker]]:
        """A copy of the table."""
        return dict(cls._maskers)

    @classmethod
    def config_types(cls) -> dict[str, type[MaskerConfig]]:
        """The configuration classes by JSON name, as a copy."""
        return dict(cls._names)


def json_name(config_type: type[MaskerConfig]) -> str:
    """The JSON name of a configuration class: `SinkMaskerConfig` is "sink"."""
    own: str | None = vars(config_type).get("json_name")
    if own is not None:
        return own
    stem = re.sub(r"(Masker)?Config$", "", config_type.__name__)
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", stem).lower()


@dataclass(frozen=True)
class MaskerFacts:
    """What a table of maskers says about one.

    Attributes:
        paper: Where it comes from.
        state: What it keeps about keys between steps.
        index_bytes: Bytes of that, packed, per token and KV head; or per token and query head,
            where each query head has labels of its own.
        is_by_index: Whether a decode step in process lists keys; else it weighs all of them.
        is_paged: Whether `vllm_sparse_plugin` has a counterpart that runs on pages.
    """

    paper: str
    state: str = "none"
    index_bytes: str = "0"
    is_by_index: bool = True
    is_paged: bool = False


class ResearchMasker(ABC):
    """Selects keys for each query, beyond what was selected before.

    The rule that makes a masker servable: what it selects for a query depends on that query, on
    the keys that query may see and on what was selected for it before; never on how many other
    queries are in the call. Then chunked prefill, batches and paged memory cannot change it.

    Attributes:
        facts: For tables of maskers; a masker of one's own may leave it out.
        needs_layer_idx: Whether the masker has weights, channels or projections for each layer, so
            that a call must say which layer it is of, and bring a cache.
    """

    facts: ClassVar[MaskerFacts | None] = None
    needs_layer_idx: ClassVar[bool] = False

    def __init__(self, config: MaskerConfig) -> None:
        """Keeps the configuration.

        Args:
            config: Of this masker.
        """
        self.config = config

    @abstractmethod
    def add_mask(
        self,
        keys: torch.Tensor,
        queries: torch.Tensor,
        values: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float,
        dropout: float,
        sparse_meta_data: dict[Any, Any],
        previous_mask: Mask,
        **kwargs: Any,
    ) -> Mask:
        """Adds this masker's selection to `previous_mask`.

        Args:
            keys: `(B, G, K, D)`.
            queries: `(B, H, Q, D)`; query i is at position K - Q + i.
            values: `(B, G, K, Dv)`.
            attention_mask: Additive or boolean, `(B, 1 or H, Q, >= K)`, or None; see
                `visible_keys`.
            scaling: Of the scores.
            dropout: Of the weights, in training.
            sparse_meta_data: A cache; an empty one gives the same result.
            previous_mask: `(B, H, Q, K)`, what was selected before; not modified.
            kwargs: Such as `layer_idx`; without it, or with None, nothing is kept in the cache.

        Returns:
            The union, `(B, H, Q, K)`; `previous_mask` itself when nothing is added.

        Raises:
            ValueError: `layer_idx` or the cache is missing, and the masker `needs_layer_idx`.
        """

    def cache_of_layer(
        self, sparse_meta_data: dict[Any, Any] | None, kwargs: Mapping[str, Any]
    ) -> tuple[dict[Any, Any], int]:
        """The cache and the layer of a call of `add_mask`.

        Layers that nobody told apart must not share what is known of their keys: without a layer
        the cache is a new one, and the layer 0.

        Args:
            sparse_meta_data: As in `add_mask`.
            kwargs: Likewise.

        Raises:
            ValueError: One of them is missing, and the masker `needs_layer_idx`.
        """
        layer = kwargs.get("layer_idx")
        if self.needs_layer_idx:
            for name, value in (("layer_idx", layer), ("sparse_meta_data", sparse_meta_data)):
                if value is None:
                    raise ValueError(
                        f"{type(self).__name__} needs {name}, which is missing or None"
                    )
        if layer is None or sparse_meta_data is None:
            return {}, int(layer or 0)
        return sparse_meta_data, int(layer)

    @classmethod
    @abstractmethod
    def create_from_config(cls, config: MaskerConfig) -> ResearchMasker:
        """Builds the masker.

        Raises:
            ValueError: The configuration is of another masker.
        """

    @staticmethod
    def create_masker_from_config(config: MaskerConfig) -> ResearchMasker:
        """Builds the registered masker of a configuration.

        Raises:
            ValueError: None is registered for it.
        """
        return MaskerRegistry.get_masker_class(type(config)).create_from_config(config)


Config = TypeVar("Config", bound=MaskerConfig)


def require_config(config: MaskerConfig, expected: type[Config]) -> Config:
    """The configuration, known to be of the expected type.

    Raises:
        ValueError: It is not.
    """
    if not isinstance(config, expected):
        raise ValueError(f"expected a {expected.__name__}, got {type(config).__name__}")
    return config


def unselected_keys(previous_mask: Mask, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """The visible keys that a mask does not select.

    Args:
        previous_mask: `(B, H, Q, K)`.
        attention_mask: As in `visible_keys`.

    Returns:
        Boolean `(B, H, Q, K)`, the caller's own.
    """
    unselected = previous_mask.get_dense_mask() == 0
    visible = visible_keys(attention_mask, previous_mask.shape[-1])
    return unselected if visible is None else unselected & visible


def add_selected(previous_mask: Mask, selected: torch.Tensor) -> Mask:
    """The union of a mask and keys that are selected with certainty.

    Args:
        previous_mask: Not modified.
        selected: Boolean, broadcastable to the mask's shape.
    """
    weights = previous_mask.get_dense_mask().masked_fill_(selected, 1)
    return Mask.create_mask_from_dense_mask(previous_mask.shape, weights, previous_mask.dtype)
