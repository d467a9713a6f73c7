"""The base of device indices, and the registry that finds them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import torch

from vllm_sparse_plugin.paged.cache_scales import UNSCALED, CacheScales
from vllm_sparse_plugin.paged.device.space import DeviceSpace
from vllm_sparse_plugin.paged.layout import BlockIndex, BlockLayout


class DeviceIndex(ABC):
    """An index of one layer's cache.

    Attributes:
        index: What blocks hold.
        place: Where, see `BlockLayout.place_of`.
        shape: Of the cache.
        writes_rows: Whether it can write new keys and values too, in the same launch.
    """

    writes_rows: ClassVar[bool] = False

    def __init__(
        self, index: Any, layout: BlockLayout, layer_index: int, space: DeviceSpace
    ) -> None:
        """Brings what is constant to the device.

        Args:
            index: One of the layout's.
            layout: Of the blocks.
            layer_index: Of the attention layer.
            space: Of the engine.
        """
        self.index = index
        self.place = layout.place_of(index)
        self.shape = layout.shape

    @abstractmethod
    def update(
        self,
        kv_cache: torch.Tensor,
        slots: torch.Tensor,
        key: torch.Tensor | None = None,
        value: torch.Tensor | None = None,
        scales: CacheScales = UNSCALED,
    ) -> None:
        """Makes the index right again after keys were written.

        Args:
            kv_cache: See `triton_kernels`, with the new keys.
            slots: `[num_tokens]`, int64, where they are; negative = padding.
            key: `[num_tokens, num_kv_heads, head_size]`, if it `writes_rows` and they are not in
                the cache yet.
            value: Likewise.
            scales: Of the cache.
        """

    def reserve(self) -> None:  # noqa: B027  # most indices need none
        """Takes, and gives back, memory that some step needs, for vLLM to see how much it is."""


_INDICES: dict[type[BlockIndex], type[DeviceIndex]] = {}
Index = TypeVar("Index", bound="type[DeviceIndex]")


def device_index_of(index_type: type[BlockIndex]) -> Callable[[Index], Index]:
    """Class decorator: the device's side of an index class."""

    def decorate(index: Index) -> Index:
        _INDICES[index_type] = index
        return index

    return decorate


def device_index(
    index: BlockIndex, layout: BlockLayout, layer_index: int, space: DeviceSpace
) -> DeviceIndex:
    """The device's side of an index in one layer."""
    return _INDICES[type(index)](index, layout, layer_index, space)
