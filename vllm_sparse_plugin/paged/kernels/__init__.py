"""Numba kernels over paged caches; plain arrays in, plain arrays out.

Shapes and names that all of them share (`layout.py` has the bytes):

- `elements` `[num_blocks, num_kv_heads, width]`: a layer's cache, float32, or uint16 or uint8 where
  the cache is of a type with so many bits, which `kind` says (see `rows`). The last two axes are a
  block's memory, and only their product has a meaning: of one KV head after the other, a row of key
  per token and a row of value per token (`rows.first_key`); then the indices.
- `records`: the same memory as uint8.
- `place`: where an index is: bytes from a block's start to that of KV head 0, and from one KV
  head's to the next one's (`index_places.first_byte`).
- `rows` `[num_queries]`: the row of `block_table` `[num_rows, max_blocks]` that a query belongs to.
- `lengths` `[num_queries]`: how many keys the query sees; its own is the last of them.
- a *unit* selects: a query head, or the query heads of a KV head together. Units of one query are
  side by side: unit `u` of query `i` is row `i * num_units + u`.
- `flags` `[num_queries * num_units, capacity]`, uint8: 0 = not selected, 1 = selected for certain,
  2 = sampled with the unit's `probability`, 3 = sampled with a probability of its own, of
  `key_probability`. Written up to the query's length.
- `key_probability` `[num_queries * num_units, capacity]`, float32, of keys with flag 3; `[0, 0]`
  where no masker gives such flags.
"""

import contextlib
import hashlib
import os
from pathlib import Path

import numba
import torch

from vllm_sparse_plugin.compat.llvmlite_names import hide_special_names


def _keep_compiled_kernels() -> None:
    """Where numba keeps what it has compiled, unless its own variable says where.

    numba looks at the age of a kernel's own file alone, and would go on using a kernel with an old
    version of another file's function in it. So the folder's name comes from all files' contents.
    """
    if numba.config.CACHE_DIR:
        return
    contents = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        contents.update(file.read_bytes())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = f"kernels-{contents.hexdigest()[:16]}"
    numba.config.CACHE_DIR = str(cache / "vllm_sparse_plugin" / folder)


def _allow_all_threads() -> None:
    """Lets numba have as many threads as torch; `threads.start` says how many it uses.

    numba looks at the cores that the importing thread may run on. vLLM may have tied that thread to
    one of them before.
    """
    if "NUMBA_NUM_THREADS" in os.environ:
        return
    count = max(torch.get_num_threads(), len(os.sched_getaffinity(0)))
    if count > numba.config.NUMBA_NUM_THREADS:
        os.environ["NUMBA_NUM_THREADS"] = str(count)
        # If numba's threads run already, it keeps their number, and `threads.start` warns.
        with contextlib.suppress(RuntimeError):
            numba.config.reload_config()


hide_special_names()
_allow_all_threads()
_keep_compiled_kernels()
