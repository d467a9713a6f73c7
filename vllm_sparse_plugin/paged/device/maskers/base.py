"""The base of maskers on the device, and the registry that finds them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch

from sparse_attention_hub.sparse_attention.research_attention.maskers.base import json_name
from vllm_sparse_plugin.paged.device.queries import DeviceQueries
from vllm_sparse_plugin.paged.device.space import DeviceSpace
from vllm_sparse_plugin.paged.maskers.base import PagedMasker, Unsupported


class DeviceMasker(ABC):
    """Selects the keys that its paged masker selects, in launches alone.

    Attributes:
        paged: The masker on CPUs, with the configuration, the shape and the indices.
        is_range: Whether it selects the keys of a range, whose begin and end are its sizes.
    """

    is_range: ClassVar[bool] = False

    def __init__(self, paged: PagedMasker, space: DeviceSpace) -> None:
        """Asks for memory.

        Args:
            paged: See the class.
            space: Of the list of maskers.
        """
        self.paged = paged
        self.config: Any = paged.config
        self.shape = paged.shape

    def sizes(self, lengths: np.ndarray) -> list[np.ndarray]:
        """What follows from lengths alone, computed on the host once per step.

        Args:
            lengths: `[num_queries]`, int64: keys that each query sees; 0 = padding.

        Returns:
            Rows for `select`, each `[num_queries]`, an integer type.
        """
        return []

    @abstractmethod
    def select(self, queries: DeviceQueries, sizes: torch.Tensor) -> None:
        """Adds to the flags what the masker selects beyond what is selected already.

        Args:
            queries: Of a layer and step.
            sizes: `[rows, num_queries]`, int32: see `sizes`.
        """


_COUNTERPARTS: dict[type[PagedMasker], type[DeviceMasker]] = {}
Masker = TypeVar("Masker", bound="type[DeviceMasker]")


def device_masker_of(paged_type: type[PagedMasker]) -> Callable[[Masker], Masker]:
    """Class decorator: the device's counterpart of a paged masker."""

    def decorate(masker: Masker) -> Masker:
        _COUNTERPARTS[paged_type] = masker
        return masker

    return decorate


def device_masker(paged: PagedMasker, space: DeviceSpace) -> DeviceMasker:
    """The counterpart of a paged masker.

    Raises:
        Unsupported: There is none.
    """
    masker = _COUNTERPARTS.get(type(paged))
    if masker is None:
        raise Unsupported(f"{json_name(type(paged.config))} has no counterpart on CUDA")
    return masker(paged, space)
