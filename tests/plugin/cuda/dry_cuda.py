"""Runs a module as if this machine had an NVIDIA H200: `python -m tests.plugin.cuda.dry_cuda MODULE
ARGS`.

vLLM takes its CUDA platform and all that follows from it. Cuda tensors are CPU tensors, Triton
kernels run in Triton's interpreter, and vLLM's compiled kernels are missing: engines need
`ENGINE_OPTIONS`.
"""

import os
import runpy
import sys
from typing import Any

ENVIRONMENT = {
    "TRITON_INTERPRET": "1",
    "TORCHDYNAMO_DISABLE": "1",  # nothing is there to compile for
    "OMP_NUM_THREADS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine must run in this process
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "SPARSE_ATTENTION_DENSE_BACKEND": "TRITON_ATTN",  # FlashAttention is compiled for GPUs
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}

ENGINE_OPTIONS: dict[str, Any] = {
    "compilation_config": {"mode": 0, "custom_ops": ["none"]},
    "kv_cache_memory_bytes": 1 << 26,  # else graphs are captured twice, to see what they take
    "kernel_config": {
        "ir_op_priority": {"rms_norm": ["native"], "fused_add_rms_norm": ["native"]},
        "enable_jit_warmup": False,  # it samples by kernels that the interpreter cannot run
    },
}
"""Of `vllm.LLM`: PyTorch's own ops in place of vLLM's compiled ones, and little work."""

GRAPHS: dict[str, Any] = {
    **ENGINE_OPTIONS["compilation_config"],
    "cudagraph_mode": "FULL_DECODE_ONLY",
    "cudagraph_capture_sizes": [1, 2, 4],
}
"""Another `compilation_config`: decode steps are replays of graphs."""


def install() -> Any:
    """Makes this process believe in the GPU.

    Returns:
        The mode in which it does, a context manager.
    """
    os.environ.update(ENVIRONMENT)
    from tests.plugin.cuda import graphs, interpreted_launches, torch_cuda
    from tests.plugin.cuda.device_mode import DeviceMode

    torch_cuda.install()
    graphs.install()
    interpreted_launches.patch_language_once()
    interpreted_launches.install(graphs.launch)
    mode = DeviceMode()
    with mode:
        from tests.plugin.cuda import vllm_platform

        vllm_platform.install()
    return mode


if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    with install():
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
