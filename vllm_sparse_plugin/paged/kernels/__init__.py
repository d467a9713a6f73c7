"""Numba kernels over paged caches; plain arrays in, plain arrays out.

Shapes and names that all of them share (`layout.py` has the bytes):

- `elements` `[num_blocks, num_kv_heads, width]`: a layer's cache, float32, or uint16 where the
  cache is bfloat16 (`kind` 1) or float16 (`kind` 2). Of a block and KV head, the keys come first, a
  row per token, then the values, then the index.
- `rows` `[num_queries]`: the row of `block_table` `[num_rows, max_blocks]` that a query belongs to.
- `lengths` `[num_queries]`: how many keys the query sees; its own is the last of them.
- a *unit* selects: a query head, or the query heads of a KV head together. Units of one query are
  side by side: unit `u` of query `i` is row `i * num_units + u`.
- `flags` `[num_queries * num_units, capacity]`, uint8: 0 = not selected, 1 = selected for certain,
  2 = sampled with the unit's `probability`. Written up to the query's length.
"""

from vllm_sparse_plugin.compat.llvmlite_names import hide_special_names

hide_special_names()
