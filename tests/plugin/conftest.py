"""Kernels are defined for Triton's interpreter before test modules import what launches them."""

import importlib.util

import torch

if importlib.util.find_spec("triton") is not None and not torch.cuda.is_available():
    from tests.plugin.triton.interpreter import import_interpreted

    import_interpreted("vllm_sparse_plugin.paged.triton_kernels")
