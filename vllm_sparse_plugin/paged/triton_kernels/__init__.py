"""Triton kernels over paged caches: the CUDA twins of `kernels`.

The indices that they write are those of the numba kernels, bit for bit, up to the sign of zeros
(but for what names a learned state, see `learned_blocks`); one index, two sets of kernels. Names,
shapes and units are those of `kernels`. Besides:

- `kv_cache` `[num_blocks, num_kv_heads, block_size, width]`: a layer's cache as vLLM has it,
  contiguous, float32, bfloat16, float16 or float8_e4m3fn (keys and values of 8 bits are divided by
  `CacheScales`). The last three axes are a block's memory, and only their product has a meaning: of
  one KV head after the other, a row `key | value` per token, as vLLM's own CUDA kernels read it (on
  CPUs keys are side by side, and values); then the indices, as on CPUs (`layout` has the bytes).
- *Capacity*. The last axis of what has a place per key or page is as long as the longest sequence
  may be; a multiple of 16 is best. What lies past a query's own length is not written, and has no
  effect. Entries of a block table behind a sequence's blocks may be anything.
- *CUDA graphs*. No launcher looks at a value on the device, waits for it, or asks for memory: grids
  come from shapes alone, loops end at lengths that programs read themselves, and workspaces are
  made once. A query of length 0 is padding: it selects nothing, and its output is left alone,
  unless it reads all keys or somebody else might (`attention.attend_lists`, `whole`).
  Negative slots are padding too.
- *Batch invariance*. Float sums are taken in parts that follow from the query's own length, so
  that a query's result does not depend on what else is in the batch, or on how many programs run.

A file's kernels take pointers, sizes and constants, and start with an underscore; a launcher beside
them has the arguments' meaning. Kernels that write and scan indices are compiled without fusing of
products and sums, unless they say `fma`: their numbers have to be rounded as the reference rounds
them (but for scores on tensor cores, see `page_products`). Where `TRITON_INTERPRET=1` is set before
this package is imported, all of them run on the CPU.
"""
