"""The index of MagicPIG: of each centred key, its bucket in each hash table."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch

from sparse_attention_hub.sparse_attention.research_attention.maskers.random_projections import (
    projections_of_layer,
)
from sparse_attention_hub.sparse_attention.research_attention.maskers.sampling.implementations.magic_pig import (  # noqa: E501
    prefix_mean,
)
from vllm_sparse_plugin.paged.kernels.bucket_signatures import sign_keys
from vllm_sparse_plugin.paged.layout import BlockShape, LayerCache
from vllm_sparse_plugin.paged.learned_index import LearnedIndex, ShortBlocks

_UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}


@dataclass(frozen=True)
class BucketSignatures(LearnedIndex):
    """Signatures of all keys.

    Attributes:
        tables: Hash tables, L.
        bits: Of a table, K.
        center: Whether the mean of the sequence's first keys is subtracted; else nothing is
            learned, and all sequences want the same signatures.
        seed: Of the projections.
    """

    tables: int
    bits: int
    center: bool
    seed: int

    @property
    def unsigned(self) -> np.dtype:
        """The type of a stored bucket."""
        width = next(width for width in _UNSIGNED if width >= self.bits)
        return np.dtype(_UNSIGNED[width])

    def projections(self, layer_index: int, shape: BlockShape) -> np.ndarray:
        """Of a layer, `[num_kv_heads, head_size, L * K]`, float32."""
        columns = self.tables * self.bits
        return _projections(self.seed, layer_index, (shape.num_kv_heads, shape.head_size, columns))

    def code_bytes(self, shape: BlockShape) -> int:
        """See `LearnedIndex.code_bytes`."""
        return self.tables * shape.block_size * self.unsigned.itemsize

    def state_width(self, shape: BlockShape) -> int:
        """See `LearnedIndex.state_width`: a mean per KV head."""
        return shape.num_kv_heads * shape.head_size

    def prefix_sizes(self, lengths: np.ndarray) -> np.ndarray:
        """See `LearnedIndex.prefix_sizes`; 0 without `center`."""
        return super().prefix_sizes(lengths) if self.center else np.zeros(len(lengths), np.int64)

    def learn(self, keys: torch.Tensor) -> np.ndarray:
        """See `LearnedIndex.learn`: the reference's mean, bit for bit."""
        if not self.center:
            return np.zeros(keys.shape[1] * keys.shape[3], np.float32)
        mean: np.ndarray = prefix_mean(keys).numpy()
        return mean

    def encode(self, cache: LayerCache, short: ShortBlocks, states: np.ndarray) -> None:
        """See `LearnedIndex.encode`."""
        shape = cache.layout.shape
        sign_keys(
            cache.elements,
            shape.kind,
            cache.records,
            cache.layout.place_of(self),
            self.header_words(shape),
            self.codes_at(shape),
            shape.block_size,
            self.projections(cache.layer_index, shape),
            self.bits,
            self.unsigned.itemsize,
            short.blocks,
            short.wanted,
            short.tags,
            short.places,
            states,
        )


@functools.lru_cache(maxsize=4096)
def _projections(seed: int, layer_index: int, shape: tuple[int, int, int]) -> np.ndarray:
    projections: np.ndarray = projections_of_layer({}, seed, layer_index, shape).numpy()
    return projections


def stored_signatures(index: BucketSignatures, cache: LayerCache) -> torch.Tensor:
    """What is stored (for tests and for whoever looks into a cache); see the headers for how many.

    Returns:
        `[num_blocks, num_kv_heads, block_size, L]`, int64.
    """
    shape = cache.layout.shape
    start = index.codes_at(shape)
    records = cache.stored(index)[..., start : start + index.code_bytes(shape)].contiguous()
    buckets = records.numpy().view(index.unsigned).astype(np.int64)
    return torch.from_numpy(buckets.reshape(*buckets.shape[:2], -1, shape.block_size)).mT
