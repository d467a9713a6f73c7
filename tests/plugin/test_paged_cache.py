"""Reading rows out of blocks that vLLM's own operations wrote."""

import pytest
import torch
from vllm.platforms import current_platform

from tests.cpu_features import needs_amx
from vllm_sparse_plugin import compat
from vllm_sparse_plugin.paged_cache import cpu_block_reader, gather_row, read_token_major

current_platform.import_kernels()

ISAS = ["vec", "vec16", pytest.param("amx", marks=needs_amx)]


def filled_cache(block_size: int, heads: int, head_size: int, seq_len: int, dtype, isa: str):
    """A poisoned cache with one sequence in scattered blocks, and what was written."""
    generator = torch.Generator().manual_seed(seq_len * 7 + heads)
    key = torch.randn(seq_len, heads, head_size, generator=generator).to(dtype)
    value = torch.randn(seq_len, heads, head_size, generator=generator).to(dtype)
    num_blocks = -(-seq_len // block_size)
    cache = torch.full((num_blocks + 3, heads, block_size, 2 * head_size), torch.nan, dtype=dtype)
    table = torch.randperm(num_blocks + 3, generator=generator)[:num_blocks].int()
    slots = torch.arange(seq_len)
    slots = table[slots // block_size].long() * block_size + slots % block_size
    halves = cache.view(cache.shape[0], heads, 2 * block_size, head_size).chunk(2, dim=2)
    compat.cpu_write_key_value(key, value, *halves, slots, isa)
    # Entries past the sequence may be garbage: vLLM leaves old ones there.
    table = torch.cat([table, torch.tensor([12345, -1], dtype=torch.int32)])
    return cache, table, key, value


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("block_size", "heads", "head_size"), [(32, 1, 64), (64, 3, 64), (128, 2, 128), (32, 2, 32)]
)
@pytest.mark.parametrize("offset", [-1, 0, 1])
def test_gathers_what_was_written(isa, dtype, block_size, heads, head_size, offset) -> None:
    if isa == "amx" and dtype is not torch.bfloat16:
        isa = "vec"  # vLLM tiles for AMX in bfloat16 only
    for seq_len in (1, 2 * block_size + offset):
        cache, table, key, value = filled_cache(block_size, heads, head_size, seq_len, dtype, isa)
        read = cpu_block_reader(block_size, head_size, dtype, isa)
        found_key, found_value = gather_row(read, cache, table, seq_len)
        assert found_key.shape == (1, heads, seq_len, head_size)
        # A copy: equal to the last bit.
        assert torch.equal(found_key[0].transpose(0, 1), key)
        assert torch.equal(found_value[0].transpose(0, 1), value)


@pytest.mark.parametrize("seq_len", [1, 15, 16, 17, 33])
def test_token_major_blocks(seq_len: int) -> None:
    cache = torch.randn(5, 2, 16, 2 * 8)
    table = torch.tensor([3, 0, 4, 999], dtype=torch.int32)
    key, value = gather_row(read_token_major, cache, table, seq_len)
    for token in range(seq_len):
        row = cache[table[token // 16], :, token % 16]
        assert torch.equal(key[0, :, token], row[:, :8])
        assert torch.equal(value[0, :, token], row[:, 8:])


def test_refuses_an_operation_that_does_not_reorder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "cpu_write_key_value", lambda *arguments: None)
    cpu_block_reader.cache_clear()
    with pytest.raises(RuntimeError, match="not a permutation"):
        cpu_block_reader(32, 64, torch.float32, "vec")
    cpu_block_reader.cache_clear()
