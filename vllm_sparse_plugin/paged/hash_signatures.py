"""The index of HashAttention: a bit signature of each key, made by a small network."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

import numpy as np
import torch

from sparse_attention_hub.sparse_attention.research_attention.maskers.fixed.implementations.hashattention_top_k import (  # noqa: E501
    ACTIVATIONS,
)
from sparse_attention_hub.sparse_attention.utils.hashattention_utils import load_hat_weights
from vllm_sparse_plugin.paged.kernels.hash_signatures import (
    apply_layer,
    pack_signs,
    read_keys,
    write_signatures,
)
from vllm_sparse_plugin.paged.layout import BlockIndex, BlockShape, LayerCache

_WORD_BITS, _WORD_BYTES = 32, 4
_TOKENS_AT_ONCE = 512
"""Keys that go through the networks together; it bounds the memory of their hidden layers."""


@dataclass(frozen=True)
class Networks:
    """One layer's networks of one side.

    Attributes:
        matrices: Per linear layer, `[networks, in, out]`, float32.
        biases: Likewise, `[networks, out]`.
    """

    matrices: list[np.ndarray]
    biases: list[np.ndarray]

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self.matrices[0])

    @property
    def num_channels(self) -> int:
        """What they take."""
        return int(self.matrices[0].shape[1])

    @property
    def num_bits(self) -> int:
        """What they give."""
        return int(self.matrices[-1].shape[2])

    @property
    def hidden_sizes(self) -> tuple[int, ...]:
        """What each linear layer but the last gives."""
        return tuple(int(matrix.shape[2]) for matrix in self.matrices[:-1])


@dataclass(frozen=True)
class HashSignatures(BlockIndex):
    """Signatures of all keys, by the weight file.

    Attributes:
        weight_file: See `hashattention_utils`.
        bits: Of a signature.
        activation: Between the networks' linear layers, one of `ACTIVATIONS`.
    """

    weight_file: str
    bits: int
    activation: str

    def reason_against(self, shape: BlockShape) -> str | None:
        """Why blocks of this shape cannot hold it; None when they can."""
        allowed = {"key": {shape.num_heads, shape.num_kv_heads}}
        allowed["query"] = {n for n in range(1, shape.num_heads + 1) if shape.num_heads % n == 0}
        for layer, sides in _weights(self.weight_file).items():
            for side, networks in sides.items():
                if networks.num_channels != shape.head_size:
                    return (
                        f"layer {layer}: the {side} networks take {networks.num_channels} "
                        f"channels, the heads have {shape.head_size}"
                    )
                if networks.num_bits != self.bits:
                    return (
                        f"layer {layer}: the {side} networks give {networks.num_bits} bits, "
                        f"not {self.bits}"
                    )
                if networks.count not in allowed[side]:
                    return (
                        f"layer {layer} has {networks.count} {side} networks, "
                        f"not one of {sorted(allowed[side])}"
                    )
        counts = {sides["key"].count for sides in _weights(self.weight_file).values()}
        if len(counts) > 1:
            return f"the layers differ in their number of key networks: {sorted(counts)}"
        return None

    @property
    def words(self) -> int:
        """uint32 of a signature."""
        return -(-self.bits // _WORD_BITS)

    def rows_per_head(self, shape: BlockShape) -> int:
        """Signatures of each key: one, or one per query head that reads it."""
        sides = next(iter(_weights(self.weight_file).values()))
        return sides["key"].count // shape.num_kv_heads

    def bytes_per_block(self, shape: BlockShape) -> int:
        """See `BlockIndex.bytes_per_block`."""
        return self.rows_per_head(shape) * self.words * _WORD_BYTES * shape.block_size

    def hidden_sizes(self, side: str) -> tuple[int, ...]:
        """The most that each linear layer but the last gives, in any attention layer."""
        sizes = [sides[side].hidden_sizes for sides in _weights(self.weight_file).values()]
        return tuple(max(places) for places in itertools.zip_longest(*sizes, fillvalue=0))

    def networks(self, layer_index: int) -> dict[str, Networks] | None:
        """The networks of "key" and "query" of a layer; None: the file has nothing for it."""
        return _weights(self.weight_file).get(layer_index)

    def signatures(
        self, rows: np.ndarray, layer_index: int, side: str, num_heads: int
    ) -> np.ndarray:
        """Signatures of keys or queries.

        Args:
            rows: `[heads, num_tokens, head_size]`, float32.
            layer_index: Of the attention layer.
            side: "key" or "query".
            num_heads: A multiple of the heads and of the side's networks.

        Returns:
            `[num_heads, num_tokens, words]`, uint32.

        Raises:
            ValueError: There are no weights for the layer.
        """
        sides = self.networks(layer_index)
        if sides is None:
            raise ValueError(f"the weights have no layer {layer_index}")
        networks = sides[side]
        outputs = rows
        for step, (matrices, biases) in enumerate(
            zip(networks.matrices, networks.biases, strict=True)
        ):
            if step:
                outputs = ACTIVATIONS[self.activation](torch.from_numpy(outputs)).numpy()
            inputs = outputs
            outputs = np.empty((num_heads, rows.shape[1], matrices.shape[2]), np.float32)
            apply_layer(inputs, matrices, biases, outputs)
        words = np.empty((num_heads, rows.shape[1], self.words), np.uint32)
        pack_signs(outputs, words)
        return words

    def update(self, cache: LayerCache, slots: np.ndarray) -> None:
        """See `BlockIndex.update`."""
        shape = cache.layout.shape
        if self.networks(cache.layer_index) is None:
            return  # No masker can ask for signatures of a layer that the file leaves out.
        written = slots[slots >= 0]
        for start in range(0, len(written), _TOKENS_AT_ONCE):
            places = written[start : start + _TOKENS_AT_ONCE]
            keys = np.empty((shape.num_kv_heads, len(places), shape.head_size), np.float32)
            read_keys(cache.elements, shape.kind, shape.block_size, places, keys)
            if cache.scales.key != 1:
                keys *= np.float32(cache.scales.key)  # networks know no scale
            rows = self.rows_per_head(shape) * shape.num_kv_heads
            signatures = self.signatures(keys, cache.layer_index, "key", rows)
            write_signatures(
                signatures,
                cache.records,
                cache.layout.place_of(self),
                shape.block_size,
                places,
            )


@functools.lru_cache(maxsize=4)
def _weights(path: str) -> dict[int, dict[str, Networks]]:
    return {
        layer: {
            side: Networks(
                [np.ascontiguousarray(m.float().numpy()) for m in parts[f"{side}_matrix"]],
                [np.ascontiguousarray(b.float().numpy()) for b in parts[f"{side}_bias"]],
            )
            for side in ("query", "key")
        }
        for layer, parts in load_hat_weights(path).items()
    }


def stored_signatures(index: HashSignatures, cache: LayerCache) -> torch.Tensor:
    """What is stored (for tests and for whoever looks into a cache).

    Returns:
        `[num_blocks, num_kv_heads, rows per head, block_size, words]`, int64.
    """
    shape = cache.layout.shape
    words = cache.stored(index).contiguous().view(torch.int32).long() & 0xFFFFFFFF
    split = words.reshape(*words.shape[:2], -1, index.words, shape.block_size)
    return split.transpose(-1, -2)
