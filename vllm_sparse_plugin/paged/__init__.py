"""The fast path on CPUs: maskers that plan on blocks, and kernels that read only what is selected.

`layout` says where a block keeps keys, values and index; `kernels` are compiled with numba, which
vLLM brings along; `maskers` has one counterpart per masker of `sparse_attention_hub`;
`attention` puts them together for the queries of a step.
"""
