"""Triton kernels over paged caches: torch tensors of one device in, torch tensors out.

Names, shapes and units are those of `kernels`, and a cache's memory is the same. Besides:

- *Capacity*. The last axis of what has a place per key or page is as long as the longest sequence
  may be. What lies past a query's own length is neither read nor written.
- *CUDA graphs*. No launcher looks at a value on the device, waits for it, or asks for memory: grids
  come from shapes alone, loops end at lengths that programs read themselves, and workspaces are
  made once. A query of length 0 is padding: it selects nothing, and attends to zeros.
- *Batch invariance*. Float sums are taken in parts that follow from the query's own length, so
  that a query's result does not depend on what else is in the batch, or on how many programs run.

A file's kernels take pointers, sizes and constants, and start with an underscore; a launcher
beside them has the arguments' meaning. Where `TRITON_INTERPRET=1` is set before this package is
imported, they run on the CPU.
"""
