"""Where the indices of a block's KV heads begin.

In a block, an index has the bytes of one KV head after the other's: a *run* each. Runs are numbered
along a sequence, block by block, which is the order of memory within a block.
"""

from __future__ import annotations

import numpy as np

from vllm_sparse_plugin.paged.kernels.compiled import compiled


@compiled()
def first_byte(records: np.ndarray, place: tuple[int, int], block: int, head: int) -> np.int64:
    """Where a block's index of a KV head begins, in bytes from the cache's start.

    Args:
        records: See the package; so the next one.
        place: Of the index.
        block: Of the cache.
        head: KV head.
    """
    width = np.int64(records.shape[1] * records.shape[2])
    return np.int64(block) * width + place[0] + head * place[1]


@compiled()
def later_run(
    records: np.ndarray,
    place: tuple[int, int],
    blocks: np.ndarray,
    run: int,
    ahead: int,
    length: int,
    block_size: int,
) -> np.int64:
    """Where the run begins that has its turn some runs later, to be asked for; or the last one.

    Args:
        records: See the package; so the next one.
        place: Of the index.
        blocks: Of the sequence.
        run: Block of the sequence * KV heads + KV head.
        ahead: How many runs later.
        length: Keys of the sequence.
        block_size: Tokens of a block.
    """
    num_kv_heads = records.shape[1]
    count = (length + block_size - 1) // block_size * num_kv_heads
    later = min(run + ahead, count - 1)
    start: np.int64 = first_byte(
        records, place, blocks[later // num_kv_heads], later % num_kv_heads
    )
    return start
