"""A hook by which backends learn whose rows a step has, where runner V2 does not tell them.

Both versions of vLLM tell it for every model but those with recurrent layers (and those with an
encoder, which are refused).
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from vllm_sparse_plugin.compat.replacing import replace_once


def install_batch_hooks() -> None:
    """Installs it, once."""
    from vllm.v1.worker.gpu.model_states.mamba_hybrid import MambaHybridModelState

    module = sys.modules[MambaHybridModelState.__module__]
    wrap = functools.partial(_tell_requests, module=module)
    replace_once(MambaHybridModelState, "prepare_attn", wrap)


def _tell_requests(original: Callable[..., Any], module: ModuleType) -> Callable[..., Any]:
    """Passes on the request slots of a batch with everything else that metadata is made of."""

    @functools.wraps(original)
    def prepare_attn(self: Any, input_batch: Any, *arguments: Any, **named: Any) -> Any:
        build = module.build_attn_metadata
        # A version that passes them itself goes before this.
        told = functools.partial(build, req_idx=input_batch.idx_mapping_np)
        module.build_attn_metadata = told  # type: ignore[attr-defined]
        try:
            return original(self, input_batch, *arguments, **named)
        finally:
            module.build_attn_metadata = build  # type: ignore[attr-defined]

    return prepare_attn
