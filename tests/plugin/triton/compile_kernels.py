"""Compiles every kernel for an H100, without one; prints a line of JSON per kernel.

Run in a process of its own: here, nothing may be interpreted.
"""

import json
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from vllm_sparse_plugin.paged.channel_labels import ChannelLabels
from vllm_sparse_plugin.paged.layout import BlockLayout, BlockShape
from vllm_sparse_plugin.paged.page_bounds import PageBounds
from vllm_sparse_plugin.paged.triton_kernels.centroid_codes import encode_keys, fill_tables
from vllm_sparse_plugin.paged.triton_kernels.channel_labels import label_queries, write_labels
from vllm_sparse_plugin.paged.triton_kernels.code_scores import score_codes
from vllm_sparse_plugin.paged.triton_kernels.key_scores import score_keys
from vllm_sparse_plugin.paged.triton_kernels.label_scores import score_labels
from vllm_sparse_plugin.paged.triton_kernels.page_bounds import update_pages
from vllm_sparse_plugin.paged.triton_kernels.page_scores import score_pages
from vllm_sparse_plugin.paged.triton_kernels.signature_networks import (
    sign_queries,
    write_signatures,
)
from vllm_sparse_plugin.paged.triton_kernels.signature_scores import score_signatures
from vllm_sparse_plugin.paged.triton_kernels.writing import write_rows


class NoDevice:
    """What Triton asks of a driver before it compiles."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0


def compile_instead(kernel: JITFunction, *arguments: Any, **options: Any) -> None:
    """In place of a launch."""
    options["warmup"] = True
    compiled = run(kernel, *arguments, **options)
    print(json.dumps({"name": kernel.__name__, **{k: str(v) for k, v in compiled.asm.items()}}))


def launch_all(bits: int) -> None:
    """Of a usual model's sizes: 32 query and 8 KV heads of 128 channels in bfloat16."""
    heads, kv_heads, head_size, block_size, dtype = 32, 8, 128, 16, torch.bfloat16
    shape = BlockShape(block_size, heads, kv_heads, head_size, dtype)
    bounds = PageBounds(16, bits)
    place = BlockLayout(shape, (bounds,)).place_of(bounds)
    kv_cache = torch.zeros(2, kv_heads, block_size, 512, dtype=dtype)
    key = torch.zeros(4, kv_heads, head_size, dtype=dtype)
    query = torch.zeros(4, heads, head_size, dtype=dtype)
    longs, ints = torch.zeros(4, dtype=torch.int64), torch.zeros(4, dtype=torch.int32)
    table, scores = torch.zeros(4, 64, dtype=torch.int32), torch.zeros(4, heads, 1024)
    batch = (table, ints, ints, scores)

    write_rows(key, key, kv_cache, longs)
    sizes = (bounds.record_bytes(shape), head_size, bounds.page_size, bits)
    update_pages(kv_cache, place, *sizes, longs)
    score_pages(query, kv_cache, place, sizes[0], *sizes[2:], *batch)
    score_keys(query, kv_cache, *batch)

    channels, labels = torch.zeros(kv_heads, 16, dtype=torch.int32), torch.zeros(4, heads, 16)
    row_bytes = ChannelLabels("", "", 8, bits).row_bytes(shape)
    write_labels(kv_cache, place, row_bytes, bits, channels, head_size, longs)
    label_queries(query, channels, bits, dtype, labels)
    score_labels(labels, kv_cache, place, row_bytes, bits, 1, table, ints, ints, 1.0, scores)

    matrices = [torch.zeros(kv_heads, head_size, 64), torch.zeros(kv_heads, 64, 32)]
    biases = [torch.zeros(kv_heads, 64), torch.zeros(kv_heads, 32)]
    hidden, own = [torch.zeros(heads, 4, 64)], torch.zeros(4, heads, 1, dtype=torch.int32)
    write_signatures(kv_cache, place, matrices, biases, "silu", longs, hidden)
    sign_queries(query, matrices, biases, "silu", hidden, own)
    score_signatures(own, 32, kv_cache, place, 1, *batch)

    states = torch.zeros(1, kv_heads * 8 * 17 * 64)
    encode_keys(kv_cache, place, 64, 8, head_size, 16, 64, longs, longs, longs, longs, states)
    tables = torch.zeros(4, kv_heads, 8, 64, heads // kv_heads)
    fill_tables(query, longs, longs, states, 16, tables)
    score_codes(tables, longs, kv_cache, place, 8, *batch)


if __name__ == "__main__":
    run = JITFunction.run
    JITFunction.run = compile_instead
    driver.set_active(NoDevice())
    for each in (4, 16):
        launch_all(each)
