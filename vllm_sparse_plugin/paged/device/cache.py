"""One layer's cache on the device: keys, values and indices."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from vllm_sparse_plugin.paged.cache_scales import UNSCALED, CacheScales
from vllm_sparse_plugin.paged.device.indices.base import DeviceIndex, device_index
from vllm_sparse_plugin.paged.device.space import DeviceSpace
from vllm_sparse_plugin.paged.layout import BlockIndex, BlockLayout, require_room
from vllm_sparse_plugin.paged.triton_kernels.cache_rows import key_value_rows
from vllm_sparse_plugin.paged.triton_kernels.writing import write_rows


@dataclass(frozen=True)
class DeviceCache:
    """A layer's cache, in vLLM's tensor.

    Attributes:
        kv_cache: `[num_blocks, num_kv_heads, block_size, width]`, see `triton_kernels`.
        layout: Of its blocks.
        layer_index: Of the attention layer.
        indices: What brings each index of the layout up to date.
        scales: Of the keys and values.
    """

    kv_cache: torch.Tensor
    layout: BlockLayout
    layer_index: int
    indices: dict[BlockIndex, DeviceIndex] = field(repr=False)
    scales: CacheScales = UNSCALED

    @classmethod
    def of(
        cls,
        kv_cache: torch.Tensor,
        layout: BlockLayout,
        layer_index: int,
        space: DeviceSpace,
        scales: CacheScales = UNSCALED,
    ) -> DeviceCache:
        """Looks whether the tensor is of the layout, and brings constants to the device.

        Args:
            kv_cache: See the class.
            layout: Likewise.
            layer_index: Likewise.
            space: Of the engine.
            scales: See the class.

        Raises:
            ValueError: The tensor is not of this layout.
        """
        require_room(kv_cache, layout)
        indices = {
            index: device_index(index, layout, layer_index, space) for index in layout.indices
        }
        return cls(kv_cache, layout, layer_index, indices, scales)

    def write(self, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor) -> None:
        """Writes keys and values, and brings every index up to date.

        Args:
            key: `[num_tokens, num_kv_heads, head_size]`; `value` likewise.
            value: See `key`.
            slots: `[>= num_tokens]`, int64; negative = padding.
        """
        slots = slots[: len(key)]
        indices = list(self.indices.values())
        # A launch less for each layer and step, where the index is written with the rows.
        writer = next((index for index in indices if index.writes_rows), None)
        if writer is None:
            write_rows(key, value, self.kv_cache, slots, self.scales)
        else:
            writer.update(self.kv_cache, slots, key, value, self.scales)
        for index in indices:
            if index is not writer:
                index.update(self.kv_cache, slots, scales=self.scales)

    def rows(self) -> torch.Tensor:
        """The keys and values alone, as vLLM's own kernels take them: a view.

        Returns:
            `[num_blocks, num_kv_heads, block_size, 2 * head_size]`.
        """
        return key_value_rows(self.kv_cache, self.layout.shape.head_size)
