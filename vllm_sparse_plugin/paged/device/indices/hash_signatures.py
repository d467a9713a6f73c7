"""HashAttention's signatures of keys on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vllm_sparse_plugin.paged.cache_scales import UNSCALED, CacheScales
from vllm_sparse_plugin.paged.device.indices.base import DeviceIndex, device_index_of
from vllm_sparse_plugin.paged.device.space import DeviceSpace
from vllm_sparse_plugin.paged.hash_signatures import HashSignatures, Networks
from vllm_sparse_plugin.paged.layout import BlockLayout
from vllm_sparse_plugin.paged.triton_kernels.signature_networks import write_signatures

_TOKENS_AT_ONCE = 1024
"""Keys that go through the networks together; it bounds the memory of their hidden layers."""


@dataclass(frozen=True)
class DeviceNetworks:
    """One layer's networks of one side on the device; see `Networks`.

    Attributes:
        matrices: Per linear layer, `[networks, in, out]`, float32.
        biases: Likewise, `[networks, out]`.
    """

    matrices: tuple[torch.Tensor, ...]
    biases: tuple[torch.Tensor, ...]

    @classmethod
    def of(cls, networks: Networks, device: torch.device) -> DeviceNetworks:
        """Copies them to a device."""
        return cls(
            tuple(torch.from_numpy(matrix).to(device) for matrix in networks.matrices),
            tuple(torch.from_numpy(bias).to(device) for bias in networks.biases),
        )

    def hidden(self, scratch: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The part of `scratch_of` that these networks need: `[rows, tokens, out]` per layer."""
        found = []
        for memory, matrix in zip(scratch, self.matrices[:-1], strict=False):
            rows, tokens, _ = memory.shape
            out = matrix.shape[2]
            found.append(memory.view(-1)[: rows * tokens * out].view(rows, tokens, out))
        return found


def scratch_of(
    sizes: Sequence[int], name: str, rows: int, tokens: int, space: DeviceSpace
) -> list[torch.Tensor]:
    """Scratch of each linear layer but the last, `[rows, tokens, size]`, float32.

    Args:
        sizes: Of what they give, see `HashSignatures.hidden_sizes`.
        name: In the space.
        rows: Heads.
        tokens: Of each.
        space: Where it is.
    """
    return [
        space.buffer(f"{name} {place}", rows, tokens, size, dtype=torch.float32)
        for place, size in enumerate(sizes)
    ]


@device_index_of(HashSignatures)
class DeviceHashSignatures(DeviceIndex):
    """See `HashSignatures`.

    Attributes:
        query_networks: Of the layer; None: the file has nothing for it, and no masker can ask for
            its signatures.
    """

    def __init__(
        self, index: HashSignatures, layout: BlockLayout, layer_index: int, space: DeviceSpace
    ) -> None:
        """Brings the layer's networks to the device."""
        super().__init__(index, layout, layer_index, space)
        self.query_networks: DeviceNetworks | None = None
        sides = index.networks(layer_index)
        if sides is None:
            return
        self.query_networks = DeviceNetworks.of(sides["query"], space.device)
        self._networks = DeviceNetworks.of(sides["key"], space.device)
        tokens = min(_TOKENS_AT_ONCE, space.max_tokens)
        rows, sizes = sides["key"].count, sides["key"].hidden_sizes
        self._hidden = scratch_of(sizes, "hidden keys", rows, tokens, space)

    def update(
        self,
        kv_cache: torch.Tensor,
        slots: torch.Tensor,
        key: torch.Tensor | None = None,
        value: torch.Tensor | None = None,
        scales: CacheScales = UNSCALED,
    ) -> None:
        """See `DeviceIndex.update`."""
        if self.query_networks is None:
            return
        for start in range(0, len(slots), _TOKENS_AT_ONCE):
            write_signatures(
                kv_cache,
                self.place,
                self._networks.matrices,
                self._networks.biases,
                self.index.activation,
                slots[start : start + _TOKENS_AT_ONCE],
                self._hidden,
                scales.key,
            )
