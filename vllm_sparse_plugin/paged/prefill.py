"""Dense attention of many queries: vLLM's own kernel, on keys in the order that it wants.

That kernel multiplies matrices and wants keys transposed inside their blocks, a different order
per instruction set. Rewriting a row's keys costs two passes over them, little beside the products
of many queries with them; into the same memory each time, since fresh memory would cost as much.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from vllm_sparse_plugin import compat
from vllm_sparse_plugin.paged.kernels.reading import read_rows
from vllm_sparse_plugin.paged.layout import LayerCache, as_elements, read_into
from vllm_sparse_plugin.paged.scratch import scratch
from vllm_sparse_plugin.step_plan import DenseRow, SparseRow

MAX_SCRATCH_BYTES = 1 << 26
"""Of rewritten keys and values; longer rows are worked off by some KV heads at a time."""


def attend_prefills(
    rows: Sequence[DenseRow | SparseRow],
    query: torch.Tensor,
    written: tuple[torch.Tensor, torch.Tensor] | None,
    cache: LayerCache,
    block_table: torch.Tensor,
    scaling: float,
    isa: str,
    output: torch.Tensor,
    sink_logits: torch.Tensor | None = None,
) -> None:
    """Attention of the dense queries of some rows over every key that they see.

    Args:
        rows: Of the step.
        query: `[num_tokens, num_heads, head_size]`, of the whole step.
        written: Keys and values of the step, each `[num_tokens, num_kv_heads, head_size]`: a row
            that begins in this step needs no others, and nothing is read back for it, unless the
            cache holds less of them. None = the layer reads another one's.
        cache: Of the layer.
        block_table: `[num_rows, max_blocks]`, int32.
        scaling: Of the scores.
        isa: vLLM's name of the kernel's instruction set.
        output: As `query`; the rows' part is written.
        sink_logits: `[num_heads]`, of learned attention sinks; None = the layer has none.
    """
    if cache.layout.shape.dtype != query.dtype:
        written = None  # an answer is the same in one piece and in several
    for row in rows:
        part = slice(row.query_start, row.query_end)
        is_whole = row.query_end - row.query_start == row.seq_len
        _attend_row(
            query[part],
            None if written is None or not is_whole else (written[0][part], written[1][part]),
            cache,
            block_table[row.row],
            row.seq_len,
            scaling,
            isa,
            output[part],
            sink_logits,
        )


def _attend_row(
    query: torch.Tensor,
    written: tuple[torch.Tensor, torch.Tensor] | None,
    cache: LayerCache,
    blocks: torch.Tensor,
    seq_len: int,
    scaling: float,
    isa: str,
    output: torch.Tensor,
    sink_logits: torch.Tensor | None,
) -> None:
    shape = cache.layout.shape
    count = -(-seq_len // shape.block_size)
    block_bytes = 2 * shape.block_size * shape.head_size * query.dtype.itemsize
    heads = min(shape.num_kv_heads, max(1, MAX_SCRATCH_BYTES // (count * block_bytes)))
    group = shape.num_heads // shape.num_kv_heads
    view = output.view_as(query)
    for first in range(0, shape.num_kv_heads, heads):
        last = min(first + heads, shape.num_kv_heads)
        if written is None:
            key, value = stored_rows(cache, blocks, seq_len, first, last, query.dtype)
        else:
            key, value = (rows[:, first:last] for rows in written)
        width = slice(first * group, last * group)
        size = (count, last - first, 2 * shape.block_size, shape.head_size)
        view[:, width] = compat.cpu_attention(
            query[:, width].contiguous(),
            key,
            value,
            _memory("prefill_blocks", size, query.dtype),
            scaling,
            isa,
            None if sink_logits is None else sink_logits[width],
        )


def stored_rows(
    cache: LayerCache,
    blocks: torch.Tensor,
    num_keys: int,
    first_head: int,
    last_head: int,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of a sequence, in memory that the next call uses again.

    Args:
        cache: Of the layer.
        blocks: `[max_blocks]`, int32, of the sequence.
        num_keys: Of the sequence.
        first_head: Of the KV heads that are wanted.
        last_head: After the last one.
        dtype: Of the model.

    Returns:
        Two `[num_keys, heads, head_size]`, of the model's type.
    """
    shape = cache.layout.shape
    size = (num_keys, last_head - first_head, shape.head_size)
    key, value = (_memory(name, size, shape.dtype) for name in ("prefill_keys", "prefill_values"))
    read_rows(
        cache.elements,
        shape.block_size,
        blocks.numpy(),
        first_head,
        as_elements(key),
        as_elements(value),
    )
    if dtype == shape.dtype:
        return key, value
    scales = cache.scales
    wide = [_memory(name, size, dtype) for name in ("prefill_wide_keys", "prefill_wide_values")]
    return read_into(wide[0], key, scales.key), read_into(wide[1], value, scales.value)


def _memory(name: str, size: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """See `scratch`."""
    return torch.from_numpy(scratch(name, (*size, dtype.itemsize), np.uint8)).view(dtype)[..., 0]
