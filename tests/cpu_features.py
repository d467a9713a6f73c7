"""What vLLM's kernels can do on the CPU that runs the tests."""

import pytest
import torch

HAS_AMX: bool = torch.cpu._is_amx_tile_supported()
HAS_EIGHT_BITS: bool = HAS_AMX or torch.cpu._is_avx512_supported()

needs_amx = pytest.mark.skipif(not HAS_AMX, reason="vLLM's kernels for AMX run there alone")
needs_eight_bits = pytest.mark.skipif(
    not HAS_EIGHT_BITS, reason="vLLM has KV caches of 8 bits on CPUs with AVX-512 alone"
)
