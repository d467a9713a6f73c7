"""The fast path: maskers that plan on blocks, and kernels that read only what is selected.

`layout` says where a block keeps keys, values and index; `kernels` are compiled with numba, which
vLLM brings along; `maskers` has one counterpart per masker of `sparse_attention_hub`;
`attention` puts them together for the queries of a step. That is on CPUs; on CUDA, `device` plans
and `triton_kernels` compute, with the same indices and the same results.
"""
