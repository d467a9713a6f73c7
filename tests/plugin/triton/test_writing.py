"""Keys and values in blocks: the bytes that the numba kernel writes, and none besides."""

import pytest
import torch

from tests.plugin.paged.paged_rows import make_rows, shape_of
from tests.plugin.triton.interpreter import DEVICE
from tests.plugin.triton.paged_caches import assert_same_bytes, written_again
from vllm_sparse_plugin.paged.layout import BlockLayout
from vllm_sparse_plugin.paged.triton_kernels.writing import write_rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("kv_heads", "head_size", "block_size"), [(1, 32, 16), (3, 80, 32), (2, 128, 128), (7, 64, 48)]
)
def test_bytes(dtype: torch.dtype, kv_heads: int, head_size: int, block_size: int) -> None:
    layout = BlockLayout(shape_of(kv_heads, kv_heads, head_size, block_size, dtype))
    lengths = (0, 1, block_size - 1, block_size, block_size + 1)
    rows = make_rows(layout, lengths, exact=False)
    assert_same_bytes(rows, written_again(rows, lambda kv_cache, slots: None))


def test_slots_may_be_fewer_or_more_than_tokens() -> None:
    layout = BlockLayout(shape_of(2, 2, 8, 16))
    kv_cache = torch.zeros(2, 2, 16, layout.bytes_per_token // 4, device=DEVICE)
    key = torch.arange(1, 4.0, device=DEVICE)[:, None, None].expand(3, 2, 8).contiguous()
    write_rows(key, key, kv_cache, torch.tensor([17, -1], device=DEVICE))
    write_rows(key[2:], key[2:], kv_cache, torch.tensor([2, 5, 9], device=DEVICE))
    flat = kv_cache.view(2, 2, 16, 2, 8)  # blocks, heads, tokens, key and value, channels
    expected = torch.zeros_like(flat)
    expected[1, :, 1] = 1.0
    expected[0, :, 2] = 3.0
    assert torch.equal(flat, expected)


def test_what_does_not_fit_is_refused() -> None:
    kv_cache = torch.zeros(2, 2, 16, 16, dtype=torch.float16)
    key, slots = torch.zeros(3, 2, 8), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match="for a cache of torch.float16"):
        write_rows(key, key, kv_cache, slots)
    half = key.half()
    with pytest.raises(ValueError, match="side by side"):
        write_rows(half, torch.zeros(3, 8, 2).half().transpose(1, 2), kv_cache, slots)
    with pytest.raises(ValueError, match="must be contiguous"):
        write_rows(half, half, kv_cache.transpose(0, 1), slots)
