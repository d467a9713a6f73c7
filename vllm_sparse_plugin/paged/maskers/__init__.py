"""Counterparts of the hub's maskers on pages, one file each.

A file registers its class for a configuration class. A masker without a counterpart is served by
the general path.

`pq_cache` has none on purpose. Its codebook is learned from a sequence's first 2**n keys and anew
when the sequence has twice as many; codes in a block that several sequences share would have to be
of several codebooks at once, and those in older blocks would be stale. Codes made anew in each step
would cost a read of every key, which is what an index saves.

`magic_pig` has none either: it centres keys by the mean of such a prefix before it hashes them, so
that a key's signature changes when the sequence has doubled. Without `center` a signature depends
on the key alone; but each sampled key has a probability of its own, of its angle with the query,
where flags know one probability per unit.
"""

from vllm_sparse_plugin.paged.maskers import (  # noqa: F401  # each registers itself
    adaptive_sampling,
    causal,
    double_sparsity_top_k,
    hash_attention_top_k,
    local,
    oracle_top_k,
    oracle_top_p,
    quest_top_k,
    random_sampling,
    sink,
)
