"""The threads that the kernels run on."""

from __future__ import annotations

import contextlib
import logging
import os

import numba
import numpy as np

from vllm_sparse_plugin.paged.kernels.lists import clear_flags

logger = logging.getLogger(__name__)


def start(count: int) -> None:
    """Starts numba's threads, and uses as many as vLLM gives torch.

    vLLM ties this thread to one core. Threads inherit that: numba's would all share the core. So
    they are started while this thread may run wherever any thread of the process may.

    Args:
        count: Threads to use.
    """
    if count > numba.config.NUMBA_NUM_THREADS:
        logger.warning(
            "sparse attention: kernels run on %d threads, not %d: numba was loaded with fewer; set "
            "NUMBA_NUM_THREADS",
            numba.config.NUMBA_NUM_THREADS,
            count,
        )
    own = os.sched_getaffinity(0)
    everywhere = set(own)
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(OSError):  # it has ended
            everywhere |= os.sched_getaffinity(int(thread))
    os.sched_setaffinity(0, everywhere)
    try:
        numba.set_num_threads(min(count, numba.config.NUMBA_NUM_THREADS))
        # The first parallel loop of a process starts its threads.
        clear_flags(np.empty((1, 8), np.uint8), np.ones(1, np.int32))
    finally:
        os.sched_setaffinity(0, own)
