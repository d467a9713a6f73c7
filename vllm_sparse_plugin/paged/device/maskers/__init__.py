"""Counterparts of the paged maskers on the device, a file each; each registers itself.

A masker without one is served by the general path.
"""

from vllm_sparse_plugin.paged.device.maskers import (  # noqa: F401  # each registers itself
    adaptive_sampling,
    causal,
    double_sparsity_top_k,
    hash_attention_top_k,
    local,
    magic_pig,
    oracle_top_k,
    oracle_top_p,
    pq_cache,
    quest_top_k,
    random_sampling,
    sink,
)
