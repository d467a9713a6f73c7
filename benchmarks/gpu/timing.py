"""How long launches take on the device, with nothing of their data in its cache.

What is measured is recorded into a CUDA graph once and replayed: the host's own work is not in the
time, as it is not in a server that decodes with graphs. Before each replay the L2 cache is filled
with other data: written, so that it holds nothing of what is measured, and then read elsewhere, so
that what was written is out of it and is not written back while the clock runs.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch

logger = logging.getLogger(__name__)

Launch = Callable[[], object]

IN_GRAPH = "CUDA graph, cold L2"
ONE_BY_ONE = "CUDA events, launched one by one, cold L2"
DRY = "host clock: a dry run, not a measurement"
_WARM_UPS = 3
_L2_BYTES = 64 << 20
"""Where the device does not say: no smaller than that of an H200."""


@dataclass(frozen=True)
class Timing:
    """Of one launch.

    Attributes:
        microseconds: The median.
        low: Lower quartile.
        high: Upper quartile.
        runs: Of which.
        method: How it was measured.
    """

    microseconds: float
    low: float
    high: float
    runs: int
    method: str

    def to_dict(self) -> dict[str, Any]:
        """For a JSON file."""
        return asdict(self)


def summary(microseconds: Sequence[float], method: str) -> Timing:
    """Median and quartiles.

    Args:
        microseconds: Of each run; at least one.
        method: See `Timing`.
    """
    low, middle, high = (
        statistics.quantiles(microseconds, n=4, method="inclusive")
        if len(microseconds) > 1
        else [microseconds[0]] * 3
    )
    return Timing(middle, low, high, len(microseconds), method)


class Stopwatch(Protocol):
    """Measures launches."""

    def time(self, launches: Sequence[Launch]) -> Timing:
        """Of one of the launches, on average; they follow each other, on different memory.

        Args:
            launches: Alike, but for their data. Several, where one would be too short for a clock.
        """


class GpuStopwatch:
    """By CUDA events around replays of a graph."""

    def __init__(self, device: torch.device, runs: int) -> None:
        """Asks for the memory that fills the cache.

        Args:
            device: A GPU.
            runs: Replays.
        """
        self._runs = runs
        properties = torch.cuda.get_device_properties(device)
        cached = max(int(getattr(properties, "L2_cache_size", 0)), _L2_BYTES)
        # Four times as much: the cache need not throw out the oldest data first.
        self._written = torch.zeros(cached, dtype=torch.float32, device=device)
        self._read = torch.zeros(cached, dtype=torch.float32, device=device)
        self._sum = torch.zeros((), dtype=torch.float32, device=device)

    def time(self, launches: Sequence[Launch]) -> Timing:
        """See `Stopwatch`; what no graph can hold is launched one by one."""
        for _ in range(_WARM_UPS):
            for launch in launches:
                launch()
        torch.cuda.synchronize()
        replay, method = in_turn(launches), ONE_BY_ONE
        try:
            replay, method = captured(launches).replay, IN_GRAPH
        except RuntimeError as error:
            logger.warning("not in a CUDA graph: %s", error)
            torch.cuda.synchronize()
        return summary([took / len(launches) for took in self._times(replay)], method)

    def _times(self, replay: Launch) -> list[float]:
        """In microseconds, of each run."""
        pairs = []
        for _ in range(self._runs + 1):
            self._written.fill_(1.0)
            torch.sum(self._read, dim=0, out=self._sum)
            begin, end = (_event() for _ in range(2))
            begin.record()
            replay()
            end.record()
            pairs.append((begin, end))
        torch.cuda.synchronize()
        return [1e3 * begin.elapsed_time(end) for begin, end in pairs[1:]]


def in_turn(launches: Sequence[Launch]) -> Launch:
    """All of them, one after the other, by the host."""

    def run() -> None:
        for launch in launches:
            launch()

    return run


def captured(launches: Sequence[Launch]) -> torch.cuda.CUDAGraph:
    """All of them in one graph.

    Raises:
        RuntimeError: No graph can hold one of them.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        in_turn(launches)()
    return graph


class DryStopwatch:
    """By the host's clock, once: to see on any machine that everything runs."""

    def time(self, launches: Sequence[Launch]) -> Timing:
        """See `Stopwatch`."""
        started = time.perf_counter()
        for launch in launches:
            launch()
        return summary([1e6 * (time.perf_counter() - started) / len(launches)], DRY)


def stopwatch(device: torch.device | str, runs: int = 50) -> Stopwatch:
    """The device's.

    Args:
        device: A GPU, or the CPU for a dry run.
        runs: Of each measurement.
    """
    device = torch.device(device)
    return GpuStopwatch(device, runs) if device.type == "cuda" else DryStopwatch()


def host_microseconds(work: Launch, runs: int = 20) -> float:
    """Median of what the host itself takes, what it has launched not waited for.

    Args:
        work: Of the host.
        runs: Of it; the first does not count.
    """
    times = []
    for _ in range(runs + 1):
        started = time.perf_counter()
        work()
        times.append(1e6 * (time.perf_counter() - started))
    return statistics.median(times[1:])


def copy_bandwidth(device: torch.device | str, watch: Stopwatch, size: int) -> float:
    """Bytes per second that a copy reads and writes: what other kernels are compared with.

    The fastest of several copies: CUDA's own is not always, least so as a node of a graph.

    Args:
        device: Of the copy.
        watch: Of the device.
        size: Bytes that are copied.
    """
    source = torch.ones(size // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    wide, wide_target = source.view(torch.float64), target.view(torch.float64)
    ways: list[Launch] = [
        lambda: target.copy_(source),
        lambda: torch.neg(source, out=target),
        lambda: torch.neg(wide, out=wide_target),
    ]
    fastest = min(watch.time([way]).microseconds for way in ways)
    return 2 * source.nbytes / (1e-6 * fastest)


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
