"""Labels of keys (Double Sparsity): some channels of each key, in few bits.

A block and KV head has one or more rows of labels, each with channels of its own. A row is kept
channel by channel, so that neighbouring tokens are worked on together. With `bits` 16 it is
`[channels, block_size]` of the cache's own elements. With less it is, of each token, the smallest
and the largest of its values, `[2, block_size]` of such elements, and then codes,
`[bytes of a token, block_size]`: byte j of a token holds channels j, j + width, ... of `width`
bytes. `label_scores` reads them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import prange

from vllm_sparse_plugin.paged.kernels.compiled import compiled
from vllm_sparse_plugin.paged.kernels.index_places import first_byte
from vllm_sparse_plugin.paged.kernels.rows import first_key, load_row


@compiled()
def _extremes_of(key: np.ndarray, channels: np.ndarray) -> tuple[int, int]:
    """The channels of a key's smallest and largest value."""
    lowest, highest = channels[0], channels[0]
    for channel in channels:
        lowest = channel if key[channel] < key[lowest] else lowest
        highest = channel if key[channel] > key[highest] else highest
    return lowest, highest


@compiled()
def _step_of(low: np.float32, high: np.float32, levels: np.float32) -> Any:
    return (high - low) / levels if high > low else np.float32(1.0)


@compiled()
def _code_of(value: float, low: float, step: float, levels: float) -> Any:
    return min(max(np.rint((value - low) / step), np.float32(0.0)), levels)


@compiled()
def label_queries(query: np.ndarray, channels: np.ndarray, bits: int, labels: np.ndarray) -> None:
    """The queries' kept channels, as `pseudo_quantize` leaves them.

    Args:
        query: `[num_queries, num_heads, head_size]`, float32.
        channels: `[rows, C]`, int32; a divisor of the query heads.
        bits: Of a code.
        labels: `[num_queries, num_heads, C]`, float32; written.
    """
    num_queries, num_heads, _ = query.shape
    group = num_heads // channels.shape[0]
    levels = np.float32((1 << bits) - 1)
    for index in range(num_queries):
        for head in range(num_heads):
            own = channels[head // group]
            values, label = query[index, head], labels[index, head]
            for c in range(own.shape[0]):
                label[c] = values[own[c]]
            if bits < 16:
                lowest, highest = _extremes_of(values, own)
                low = values[lowest]
                step = _step_of(low, values[highest], levels)
                for c in range(own.shape[0]):
                    label[c] = _code_of(label[c], low, step, levels) * step + low


@compiled(parallel=True)
def write_labels(
    elements: np.ndarray,
    kind: int,
    records: np.ndarray,
    place: tuple[int, int],
    row_bytes: int,
    bits: int,
    channels: np.ndarray,
    head_size: int,
    block_size: int,
    slots: np.ndarray,
) -> None:
    """Writes the labels of new keys; the codes are those of `pseudo_quantize`.

    Args:
        elements: See the package, with the new keys.
        kind: Of the elements.
        records: See the package; so `place`.
        place: Of the index.
        row_bytes: Of one row of labels.
        bits: Of a code.
        channels: `[rows, C]`, int32; a multiple of the KV heads, each head's rows side by side.
        head_size: Channels of a key.
        block_size: Tokens of a block.
        slots: Of the new keys; negative = padding.
    """
    num_kv_heads = elements.shape[1]
    rows, count = channels.shape
    per_head = rows // num_kv_heads
    per_byte = 8 // bits if bits < 16 else 1
    width = (count + per_byte - 1) // per_byte
    levels = np.float32((1 << bits) - 1)
    flat, flat_records = elements.reshape(-1), records.reshape(-1)
    for task in prange(slots.shape[0]):
        slot = slots[task]
        if slot < 0:
            continue
        block, token = slot // block_size, slot % block_size
        buffer = np.empty(head_size, np.float32)
        for row in range(rows):
            head = row // per_head
            own = first_key(elements, block, head, block_size, head_size) + token * head_size
            start = first_byte(records, place, block, head) + row % per_head * row_bytes
            first = start // elements.itemsize + token
            if bits == 16:
                for c in range(count):
                    flat[first + c * block_size] = flat[own + channels[row, c]]
                continue
            key = load_row(flat, own, buffer, kind)
            lowest, highest = _extremes_of(key, channels[row])
            flat[first], flat[first + block_size] = flat[own + lowest], flat[own + highest]
            low = key[lowest]
            step = _step_of(low, key[highest], levels)
            codes = start + 2 * elements.itemsize * block_size + token
            for byte in range(width):
                packed = 0
                for part in range(per_byte):
                    c = byte + part * width
                    if c < count:
                        code = _code_of(key[channels[row, c]], low, step, levels)
                        packed |= int(code) << (part * bits)
                flat_records[codes + byte * block_size] = packed
