"""The index of PQCache: of each key's sub-vectors, the nearest centroids of a learned codebook."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from sparse_attention_hub.sparse_attention.research_attention.maskers.fixed.implementations.pq_top_k import (  # noqa: E501
    learned_codebook,
)
from vllm_sparse_plugin.paged.kernels.centroid_codes import encode_keys
from vllm_sparse_plugin.paged.layout import BlockShape, LayerCache
from vllm_sparse_plugin.paged.learned_index import LearnedIndex, ShortBlocks


@dataclass(frozen=True)
class CentroidCodes(LearnedIndex):
    """Codes of all keys.

    Attributes:
        sub_dim: Channels of a sub-vector.
        bits: Of a code: there are 2**bits centroids.
        iterations: Of k-means.
    """

    sub_dim: int
    bits: int
    iterations: int

    def reason_against(self, shape: BlockShape) -> str | None:
        """Why blocks of this shape cannot hold it; None when they can."""
        if shape.head_size % self.sub_dim:
            return f"pq_sub_dim {self.sub_dim} does not divide the head size {shape.head_size}"
        return None

    @property
    def stored_bits(self) -> int:
        """Of a code in a block: a divisor of a byte."""
        return next(width for width in (1, 2, 4, 8) if width >= self.bits)

    @property
    def num_centroids(self) -> int:
        """Of a sub-space, C; fewer keys than that make fewer centroids."""
        return 1 << self.bits

    def num_parts(self, shape: BlockShape) -> int:
        """Sub-vectors of a key, M."""
        return shape.head_size // self.sub_dim

    def code_bytes(self, shape: BlockShape) -> int:
        """See `LearnedIndex.code_bytes`."""
        return shape.block_size * -(-self.num_parts(shape) * self.stored_bits // 8)

    def state_width(self, shape: BlockShape) -> int:
        """See `LearnedIndex.state_width`; `kernels.centroid_codes` has the form."""
        parts = shape.num_kv_heads * self.num_parts(shape)
        return parts * (self.sub_dim + 1) * self.num_centroids

    def learn(self, keys: torch.Tensor) -> np.ndarray:
        """See `LearnedIndex.learn`: the reference's codebook, bit for bit."""
        return self.state_of(keys).numpy()

    def state_of(self, keys: torch.Tensor) -> torch.Tensor:
        """The same on any device: `[num_kv_heads, M, sub_dim + 1, C]`, float32.

        Args:
            keys: See `LearnedIndex.learn`.
        """
        books = learned_codebook(keys, self.sub_dim, self.bits, self.iterations)[0]
        heads, parts, found, _ = books.shape  # fewer centroids than C where there are fewer keys
        size = (heads, parts, self.sub_dim + 1, self.num_centroids)
        state = torch.zeros(size, device=keys.device)
        state[..., :-1, :found] = books.transpose(-1, -2)
        state[..., -1, :found] = books.square().sum(-1)
        state[..., -1, found:] = torch.inf
        return state

    def encode(self, cache: LayerCache, short: ShortBlocks, states: np.ndarray) -> None:
        """See `LearnedIndex.encode`."""
        shape = cache.layout.shape
        encode_keys(
            cache.elements,
            shape.kind,
            cache.records,
            cache.layout.place_of(self),
            self.header_words(shape),
            self.codes_at(shape),
            self.stored_bits,
            shape.block_size,
            self.sub_dim,
            self.num_centroids,
            short.blocks,
            short.wanted,
            short.tags,
            short.places,
            states,
            shape.head_size,
        )


def stored_codes(index: CentroidCodes, cache: LayerCache) -> torch.Tensor:
    """What is stored (for tests and for whoever looks into a cache); see the headers for how many.

    Returns:
        `[num_blocks, num_kv_heads, block_size, M]`, int64.
    """
    shape = cache.layout.shape
    start = index.codes_at(shape)
    records = cache.stored(index)[..., start : start + index.code_bytes(shape)]
    packed = records.reshape(*records.shape[:2], shape.block_size, -1, 1).long()
    codes = packed >> torch.arange(0, 8, index.stored_bits) & ((1 << index.stored_bits) - 1)
    return codes.flatten(start_dim=-2)[..., : index.num_parts(shape)]
