"""Bit signatures of keys and queries (HashAttention): made by small networks, compared by XOR.

A block and KV head has one or more rows of signatures, one per network that reads its keys. A row
is kept word by word, `[words, block_size]` uint32, so that neighbouring tokens are compared
together.
"""

from __future__ import annotations

import numpy as np
from numba import prange

from vllm_sparse_plugin.paged.kernels.bits import count_bits
from vllm_sparse_plugin.paged.kernels.compiled import compiled
from vllm_sparse_plugin.paged.kernels.index_places import first_byte, later_run
from vllm_sparse_plugin.paged.kernels.rows import copy_row, first_key, load_row
from vllm_sparse_plugin.paged.kernels.vectors import fetch_bytes

_TOKENS = 16
"""Tokens that one task puts through a layer."""


@compiled(parallel=True)
def read_keys(
    elements: np.ndarray, kind: int, block_size: int, slots: np.ndarray, keys: np.ndarray
) -> None:
    """Keys of some tokens, as float32.

    Args:
        elements: See the package.
        kind: Of the elements.
        block_size: Tokens of a block.
        slots: `[num_tokens]`, none negative.
        keys: `[num_kv_heads, num_tokens, head_size]`, float32; written.
    """
    head_size, flat = keys.shape[2], elements.reshape(-1)
    for token in prange(slots.shape[0]):
        block, row = slots[token] // block_size, slots[token] % block_size
        for head in range(keys.shape[0]):
            start = first_key(elements, block, head, block_size, head_size) + row * head_size
            target = keys[head, token]
            copy_row(load_row(flat, start, target, kind), target)


@compiled(fastmath={"contract"})
def _times_matrix(row: np.ndarray, matrix: np.ndarray, result: np.ndarray) -> None:
    width = result.shape[0]
    whole = row.shape[0] // 4 * 4
    result[:] = np.float32(0.0)
    for k in range(0, whole, 4):
        a, b, c, d = matrix[k], matrix[k + 1], matrix[k + 2], matrix[k + 3]
        for j in range(width):
            result[j] += row[k] * a[j] + row[k + 1] * b[j] + row[k + 2] * c[j] + row[k + 3] * d[j]
    for k in range(whole, row.shape[0]):
        a = matrix[k]
        for j in range(width):
            result[j] += row[k] * a[j]


@compiled(parallel=True)
def apply_layer(
    inputs: np.ndarray, matrices: np.ndarray, biases: np.ndarray, outputs: np.ndarray
) -> None:
    """`inputs @ matrix + bias` for each head, always in the same order of sums.

    A library's matrix product adds up in an order that depends on how many tokens there are: the
    last bits of a key's outputs, and so perhaps a sign, would depend on its neighbours.

    Args:
        inputs: `[heads_in, num_tokens, width_in]`, float32.
        matrices: `[networks, width_in, width_out]`, float32.
        biases: `[networks, width_out]`, float32.
        outputs: `[heads, num_tokens, width_out]`, float32; written. Heads of inputs and networks
            are used for as many neighbouring heads as needed.
    """
    heads, num_tokens, _ = outputs.shape
    by_input, by_network = heads // inputs.shape[0], heads // matrices.shape[0]
    tiles = (num_tokens + _TOKENS - 1) // _TOKENS
    for task in prange(heads * tiles):
        head, tile = task // tiles, task % tiles
        bias = biases[head // by_network]
        for token in range(tile * _TOKENS, min((tile + 1) * _TOKENS, num_tokens)):
            result = outputs[head, token]
            _times_matrix(inputs[head // by_input, token], matrices[head // by_network], result)
            for j in range(result.shape[0]):
                result[j] += bias[j]


@compiled(parallel=True)
def pack_signs(values: np.ndarray, words: np.ndarray) -> None:
    """Signs as bits, from the lowest: 1 for what is not negative, and 0 to fill up.

    Args:
        values: `[heads, num_tokens, bits]`, float32.
        words: `[heads, num_tokens, ceil(bits / 32)]`, uint32; written.
    """
    heads, num_tokens, bits = values.shape
    for task in prange(heads * num_tokens):
        row, packed = values[task // num_tokens, task % num_tokens], np.uint32(0)
        for bit in range(bits):
            if row[bit] >= 0:
                packed |= np.uint32(1) << np.uint32(bit % 32)
            if bit % 32 == 31 or bit + 1 == bits:
                words[task // num_tokens, task % num_tokens, bit // 32] = packed
                packed = np.uint32(0)


@compiled(parallel=True)
def write_signatures(
    signatures: np.ndarray,
    records: np.ndarray,
    place: tuple[int, int],
    block_size: int,
    slots: np.ndarray,
) -> None:
    """Writes the signatures of new keys.

    Args:
        signatures: `[networks, num_tokens, words]`, uint32; each KV head's networks side by side.
        records: See the package; so `place`.
        place: Of the index.
        block_size: Tokens of a block.
        slots: `[num_tokens]`, none negative.
    """
    networks, num_tokens, words = signatures.shape
    per_head = networks // records.shape[1]
    stored = records.reshape(-1).view(np.uint32)
    for token in prange(num_tokens):
        block, column = slots[token] // block_size, slots[token] % block_size
        for head in range(records.shape[1]):
            start = first_byte(records, place, block, head) // 4 + column
            for row in range(per_head):
                for word in range(words):
                    stored[start + (row * words + word) * block_size] = signatures[
                        head * per_head + row, token, word
                    ]


@compiled(parallel=True)
def score_signatures(
    own: np.ndarray,
    bits: int,
    records: np.ndarray,
    place: tuple[int, int],
    rows_per_head: int,
    block_size: int,
    block_table: np.ndarray,
    rows: np.ndarray,
    lengths: np.ndarray,
    scores: np.ndarray,
) -> None:
    """`bits - 2 * (bits that differ)` of each query with every key that it sees.

    Args:
        own: `[num_queries, num_heads, words]`, uint32: the queries' signatures.
        bits: Of a signature.
        records: See `write_signatures`.
        place: Of the index.
        rows_per_head: Rows of signatures per KV head: one, or one per query head.
        block_size: Tokens of a block.
        block_table: See the package; so `rows` and `lengths`.
        rows: Of the queries.
        lengths: Of the queries.
        scores: `[num_queries, num_heads, capacity]`, float32; written.
    """
    num_queries, num_heads, words = own.shape
    num_kv_heads = records.shape[1]
    heads = num_heads // num_kv_heads
    by_row = heads // rows_per_head
    size = 4 * rows_per_head * words * block_size
    stored = records.reshape(-1).view(np.uint32)
    chunks = (int(lengths.max()) + block_size - 1) // block_size
    for item in prange(num_queries * num_kv_heads * chunks):
        index, run = item // (num_kv_heads * chunks), item % (num_kv_heads * chunks)
        chunk, kv_head = run // num_kv_heads, run % num_kv_heads
        first = chunk * block_size
        count = min(block_size, lengths[index] - first)
        if count <= 0:
            continue
        blocks = block_table[rows[index]]
        later = later_run(records, place, blocks, run, 1, lengths[index], block_size)
        fetch_bytes(records, later, size)
        own_start = first_byte(records, place, blocks[chunk], kv_head) // 4
        for head in range(kv_head * heads, (kv_head + 1) * heads):
            row = (head - kv_head * heads) // by_row
            target = scores[index, head, first : first + count]
            target[:] = np.float32(bits)
            for word in range(words):
                start = own_start + (row * words + word) * block_size
                keys = stored[start : start + count]
                query = own[index, head, word]
                for t in range(count):
                    differing = np.float32(count_bits(keys[t] ^ query))
                    target[t] -= differing + differing
