"""Counterparts of the hub's maskers on pages, one file each.

A file registers its class for a configuration class. A masker without a counterpart is served by
the general path.
"""

from vllm_sparse_plugin.paged.maskers import (  # noqa: F401  # each registers itself
    double_sparsity_top_k,
    hash_attention_top_k,
    local,
    oracle_top_k,
    quest_top_k,
    sink,
)
