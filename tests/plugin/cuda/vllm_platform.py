"""vLLM's CUDA platform without CUDA, NVML or compiled kernels."""

import sys
from types import ModuleType
from typing import Any

import torch

from tests.plugin.cuda import memory, torch_cuda
from tests.plugin.cuda.device_mode import CUSTOM_OPS, DEVICE

_COMPILED = ("vllm._C_stable_libtorch", "vllm.vllm_flash_attn._vllm_fa3_C")
"""Imported on an H200; nothing in them is called."""

_ACTIVATIONS = ("silu_and_mul", "gelu_and_mul", "gelu_tanh_and_mul", "fatrelu_and_mul")
"""Compiled ops that layers look up when they are built, although they run PyTorch's own."""


def _missing(*_: Any, **__: Any) -> Any:
    raise NotImplementedError("a compiled kernel of vLLM was called: see ENGINE_OPTIONS")


class _Driver:
    """Triton's driver of an H200, asked for numbers only."""

    class utils:
        @staticmethod
        def get_device_properties(device: int) -> dict[str, int]:
            properties = torch_cuda.Properties
            return {
                "max_shared_mem": properties.shared_memory_per_block_optin,
                "multiprocessor_count": properties.multi_processor_count,
                "warpSize": properties.warp_size,
                "max_num_regs": properties.regs_per_multiprocessor,
            }

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return DEVICE

    def get_device_interface(self) -> Any:
        return torch.cuda

    def get_benchmarker(self) -> Any:
        return lambda call, quantiles: [1.0] * len(quantiles)  # the first variant is the best one


def _part_of_embedding(
    token_ids: torch.Tensor,
    weight: torch.Tensor,
    begin: int,
    end: int,
    padding: int,
    *added: int,
) -> torch.Tensor:
    """See vLLM's op of that name; of vocabularies without added tokens."""
    is_own = (token_ids >= begin) & (token_ids < end)
    own = weight[torch.where(is_own, token_ids - begin, 0).long()]
    return torch.where(is_own[:, None], own, 0.0)


def install() -> None:
    """Makes vLLM see the platform; before anything of vLLM but `vllm.platforms` is imported."""
    import triton
    from triton.backends import backends

    backends["nvidia"].driver.is_active = staticmethod(lambda: True)
    backends["amd"].driver.is_active = staticmethod(lambda: False)
    triton.runtime.driver.set_active(_Driver())

    for name in _COMPILED:
        sys.modules[name] = ModuleType(name)
    import vllm.platforms as platforms

    # What is installed is called a CPU build, for which Triton would be switched off.
    platforms.vllm_version_matches_substr = lambda text: False
    from vllm.platforms.cuda import NonNvmlCudaPlatform

    class DryCudaPlatform(NonNvmlCudaPlatform):
        dist_backend = "gloo"
        dispatch_key = "CPU"  # of custom ops, whose tensors are on the CPU

        @classmethod
        def import_kernels(cls) -> None:
            pass

        @classmethod
        def is_arch_support_pdl(cls) -> bool:
            return False  # Triton's interpreter has none of its instructions

    platforms._current_platform = DryCudaPlatform()

    from vllm.utils import torch_utils

    torch_utils.get_accelerator_view_from_cpu_tensor = memory.view_of_host
    # A graph keeps the memory of its results itself.
    torch_utils.weak_ref_tensor = lambda tensor: tensor
    register = torch_utils.direct_register_custom_op

    def register_and_remember(op_name: str, op_func: Any, *args: Any, **kwargs: Any) -> None:
        register(op_name, op_func, *args, **kwargs)
        CUSTOM_OPS.setdefault(f"vllm::{op_name}", op_func)

    torch_utils.direct_register_custom_op = register_and_remember

    # Compiles and tunes kernels ahead, those of multimodal models too, which need torchvision.
    warmup = ModuleType("vllm.model_executor.warmup.kernel_warmup")
    warmup.kernel_warmup = lambda worker, **_: None  # type: ignore[attr-defined]
    sys.modules[warmup.__name__] = warmup
    # What rewrites compiled models looks up compiled kernels, for models that are never compiled.
    passes = ModuleType("vllm.compilation.passes.pass_manager")
    passes.PostGradPassManager = object  # type: ignore[attr-defined]
    sys.modules[passes.__name__] = passes
    import vllm._custom_ops as custom_ops

    for name in _ACTIVATIONS:
        setattr(torch.ops._C, name, _missing)
    for name in dir(custom_ops):
        if "_supports_" in name:
            setattr(custom_ops, name, lambda *_: False)
    custom_ops.vocab_parallel_embedding = _part_of_embedding  # of tensor parallel engines
    # Runner V1 tries top-k by a kernel that the interpreter cannot run.
    from vllm.v1.sample.ops import topk_topp_sampler

    topk_topp_sampler.HAS_TRITON = False
    # It would import the model's module in a process of its own, since that may initialize CUDA.
    from vllm.model_executor.models import registry

    registry._run_in_subprocess = lambda function: function()
