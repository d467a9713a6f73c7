"""Which kernels a step launches, and how long each takes: to see where its time goes."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from benchmarks.gpu.timing import Launch
from vllm_sparse_plugin.paged.triton_kernels.grids import launches_apart

logger = logging.getLogger(__name__)


def kernel_microseconds(launches: Sequence[Launch], device: torch.device) -> dict[str, float]:
    """Of each kernel, the longest first, per launch; empty where there is no GPU.

    By torch's profiler, once, after a run that compiles: launches apart, without gaps between
    kernels, and with what the cache holds of the launch before.

    Args:
        launches: Alike, one after the other.
        device: Of the kernels.
    """
    if device.type != "cuda":
        return {}
    activities = [torch.profiler.ProfilerActivity.CUDA]
    try:
        with launches_apart():
            for launch in launches:
                launch()
            torch.cuda.synchronize(device)
            with torch.profiler.profile(activities=activities) as profile:
                for launch in launches:
                    launch()
                torch.cuda.synchronize(device)
        return per_launch(profile.key_averages(), len(launches))
    except RuntimeError:  # as where profiling is not allowed: nothing else depends on it
        logger.exception("no times of single kernels")
        return {}


def per_launch(events: Iterable[Any], launches: int) -> dict[str, float]:
    """Times on the device by name, the longest first.

    Args:
        events: Averages of torch's profiler.
        launches: That were profiled.
    """
    found: Counter[str] = Counter()
    for event in events:
        if event.self_device_time_total > 0:
            found[event.key] += event.self_device_time_total / launches
    return dict(found.most_common())
