"""The place for private and version-dependent names of vLLM.

(Two more are fields of what the CUDA backend derives from, in `device_metadata`.) `TESTED_VLLM` is
the range that is supported: `tests/plugin/vllm_symbols.py` and `vllm_cuda_symbols.py` hold what is
relied on, and are checked against the sources of each of its versions.
"""

from vllm_sparse_plugin.compat.cache_types import (
    SUPPORTED_CACHE_DTYPES,
    cache_scales,
    element_type,
    typed_cache,
)
from vllm_sparse_plugin.compat.cpu_operations import (
    cpu_attend,
    cpu_attention,
    cpu_write_key_value,
    load_cpu_operations,
)
from vllm_sparse_plugin.compat.engine import (
    attention_shape,
    block_shape,
    check_blocks,
    current_vllm_config,
    dense_backend,
    device_type,
    engine_being_built,
    engine_of,
    identity,
    implementations,
    is_selected,
    of_first_rank,
    processor_bases,
    remember_engine_being_built,
    serving_config,
    window_restricts,
)
from vllm_sparse_plugin.compat.engine_checks import check_cache, check_engine
from vllm_sparse_plugin.compat.hooks import (
    BACKEND_PATH,
    LEAST_KEYS,
    PAGED_BACKEND_PATH,
    STATS_METHOD,
    install,
)
from vllm_sparse_plugin.compat.versions import (
    TESTED_VLLM,
    check_vllm_version,
    installed_vllm_version,
)

__all__ = [
    "BACKEND_PATH",
    "LEAST_KEYS",
    "PAGED_BACKEND_PATH",
    "STATS_METHOD",
    "SUPPORTED_CACHE_DTYPES",
    "TESTED_VLLM",
    "attention_shape",
    "block_shape",
    "cache_scales",
    "check_blocks",
    "check_cache",
    "check_engine",
    "check_vllm_version",
    "cpu_attend",
    "cpu_attention",
    "cpu_write_key_value",
    "current_vllm_config",
    "dense_backend",
    "device_type",
    "element_type",
    "engine_being_built",
    "engine_of",
    "identity",
    "implementations",
    "install",
    "installed_vllm_version",
    "is_selected",
    "load_cpu_operations",
    "of_first_rank",
    "processor_bases",
    "remember_engine_being_built",
    "serving_config",
    "typed_cache",
    "window_restricts",
]
