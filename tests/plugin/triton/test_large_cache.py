"""Blocks behind the 2**31st element of a cache, in memory that is asked for and hardly touched."""

from pathlib import Path

import numpy as np
import pytest
import torch

from sparse_attention_hub.sparse_attention.serialization import config_from_dict
from tests.plugin.paged import test_double_sparsity_top_k as double_sparsity
from tests.plugin.paged import test_hash_attention_top_k as hash_attention
from tests.plugin.paged.paged_rows import SINK_LOCAL, shape_of
from tests.plugin.triton.interpreter import DEVICE
from vllm_sparse_plugin.paged.device.attention import DeviceAttention, device_maskers
from vllm_sparse_plugin.paged.device.cache import DeviceCache
from vllm_sparse_plugin.paged.device.sequences import Change, StepSequences, prefix_of
from vllm_sparse_plugin.paged.device.space import DeviceSpace
from vllm_sparse_plugin.paged.layout import BlockLayout
from vllm_sparse_plugin.paged.served import indices_of
from vllm_sparse_plugin.paged.triton_kernels.cache_rows import DeviceBatch

SHAPE = shape_of(8, 2, 32, 32, torch.float16)
LENGTHS = (70, 33)
BLOCKS = 3
"""Of the longer sequence."""
SAMPLING = {"type": "random_sampling", "sampling_rate": 0.3}
ADAPTIVE = {
    "type": "adaptive_sampling",
    "base_rate_sampling": 0.2,
    "epsilon": 0.2,
    "delta": 0.2,
    "init_offset": 2,
    "local_offset": 2,
}


def quest(bits: int) -> dict:
    return {"type": "quest_top_k", "heavy_size": 0.3, "page_size": 8, "label_bits": bits}


def masker_of(name: str, folder: Path) -> dict:
    return {
        "quest": lambda: quest(4),
        "quest, whole": lambda: quest(16),
        "oracle": lambda: {"type": "oracle_top_k", "heavy_size": 0.2},
        "top p": lambda: {"type": "oracle_top_p", "top_p": 0.7},
        "labels": lambda: double_sparsity.config(folder, 2, 4),
        "labels, whole": lambda: double_sparsity.config(folder, 2, 16),
        "signatures": lambda: hash_attention.config(folder, 2, heads=2, bits=8),
        "codes": lambda: {"type": "pq_cache", "heavy_size": 0.2, "pq_sub_dim": 8, "pq_bits": 3},
        "buckets": lambda: {"type": "magic_pig", "lsh_l": 6, "lsh_k": 2},
        "sampling": lambda: SAMPLING,
        "adaptive sampling": lambda: ADAPTIVE,
    }[name]()


def run(maskers: list[dict], kv_cache: torch.Tensor, layout: BlockLayout, first_block: int):
    """What the kernels leave of two sequences that begin at some block: outputs, counts, blocks."""
    space = DeviceSpace(SHAPE, 2, 96, 128, torch.device(DEVICE), max_sequences=2)
    config = config_from_dict({"maskers": maskers})
    attention = DeviceAttention(config.masker_configs, space)
    cache = DeviceCache.of(kv_cache, layout, 0, space)
    generator = torch.Generator().manual_seed(0)

    def numbers(count: int, heads: int) -> torch.Tensor:
        values = torch.randn(count, heads, SHAPE.head_size, generator=generator)
        return values.to(SHAPE.dtype).to(DEVICE)

    table = first_block + torch.arange(2 * BLOCKS).flip(0).view(2, BLOCKS)
    places = [
        table[row][torch.arange(length) // SHAPE.block_size] * SHAPE.block_size
        + torch.arange(length) % SHAPE.block_size
        for row, length in enumerate(LENGTHS)
    ]
    tokens = sum(LENGTHS)
    own = kv_cache[first_block:]
    own.zero_()
    cache.write(numbers(tokens, 2), numbers(tokens, 2), torch.cat(places).to(DEVICE))
    query = numbers(2, 8)
    output, counts = torch.zeros_like(query), torch.zeros(2, 3, dtype=torch.int64, device=DEVICE)
    batch = DeviceBatch(
        table.int().to(DEVICE),
        torch.arange(2, dtype=torch.int32, device=DEVICE),
        torch.tensor(LENGTHS, dtype=torch.int32, device=DEVICE),
        torch.arange(2, dtype=torch.int32, device=DEVICE),
    )
    sizes = torch.from_numpy(attention.sizes(np.array(LENGTHS))).to(DEVICE)
    lengths = enumerate(LENGTHS)
    changes = tuple(Change(row, row, length, prefix_of(length)) for row, length in lengths)
    sequences = StepSequences(batch, changes)
    attention.attend(query, cache, batch, sizes, 0.2, output, counts, sequences)
    return output.cpu(), counts.cpu(), own.clone().view(torch.uint8).cpu()


@pytest.mark.parametrize(
    "name",
    [
        "quest",
        "quest, whole",
        "oracle",
        "top p",
        "labels",
        "labels, whole",
        "signatures",
        "codes",
        "buckets",
        "sampling",
        "adaptive sampling",
    ],
)
def test_the_same_in_the_last_blocks_of_a_large_cache(name: str, tmp_path: Path) -> None:
    maskers = [*SINK_LOCAL, masker_of(name, tmp_path)]
    config = config_from_dict({"maskers": maskers})
    layout = BlockLayout(SHAPE, tuple(indices_of([config], SHAPE, device_maskers)))
    width = layout.bytes_per_token // SHAPE.dtype.itemsize
    size = (SHAPE.num_kv_heads, SHAPE.block_size, width)
    blocks = (1 << 31) // (size[0] * size[1] * size[2]) + 1 + 2 * BLOCKS
    try:
        large = torch.empty(blocks, *size, dtype=SHAPE.dtype, device=DEVICE)
    except RuntimeError as error:
        pytest.skip(f"no memory of 4 GiB: {error}")
    first = blocks - 2 * BLOCKS
    assert large[first].storage_offset() >= 1 << 31
    small = torch.empty(2 * BLOCKS, *size, dtype=SHAPE.dtype, device=DEVICE)
    expected, found = run(maskers, small, layout, 0), run(maskers, large, layout, first)
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine, theirs)
    assert (found[0] != 0).any()
    assert (found[1][:, 0] > 0).all()
