"""`torch.cuda` and `torch.accelerator` of a machine with one H200 whose work is done at once."""

import collections
import contextlib
from collections.abc import Callable
from typing import Any

import torch

from tests.plugin.cuda.device_mode import DEVICE, CaptureError, State

_FREE = 150_000_000_000


class Properties:
    """What `torch.cuda.get_device_properties` tells of an H200."""

    name = "NVIDIA H200"
    major = 9
    minor = 0
    total_memory = 150_754_820_096
    multi_processor_count = 132
    warp_size = 32
    L2_cache_size = 62_914_560
    max_threads_per_multi_processor = 2048
    regs_per_multiprocessor = 65_536
    shared_memory_per_block = 49_152
    shared_memory_per_block_optin = 232_448
    shared_memory_per_multiprocessor = 233_472
    gcnArchName = ""
    is_integrated = 0
    pci_bus_id = 0
    uuid = "dry"


def synchronize(*_: Any, **__: Any) -> None:
    """Nothing is to be waited for.

    Raises:
        CaptureError: In a capture.
    """
    if State.capturing:
        raise CaptureError("synchronize")


class Stream:
    """Everything on it is done when it is asked for."""

    cuda_stream = 0
    device = DEVICE
    device_index = 0

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def query(self) -> bool:
        return True

    def record_event(self, event: "Event | None" = None) -> "Event":
        return event or Event()

    def synchronize(self) -> None:
        synchronize()

    def wait_event(self, event: "Event") -> None:
        pass

    def wait_stream(self, stream: "Stream") -> None:
        pass


class Event:
    """Of a `Stream`: always reached."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def query(self) -> bool:
        return True

    def record(self, stream: Stream | None = None) -> None:
        pass

    def synchronize(self) -> None:
        synchronize()

    def wait(self, stream: Stream | None = None) -> None:
        pass

    def elapsed_time(self, end: "Event") -> float:
        return 0.1


class StreamContext:
    """Replaces `torch.cuda.stream`."""

    def __init__(self, stream: Stream | None) -> None:
        self.stream = stream

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: Any) -> None:
        pass


class Generator(torch.Generator):
    """Of the CPU, whatever is asked for."""

    def __new__(cls, device: Any = None) -> "Generator":
        return super().__new__(cls, "cpu")


_STREAM = Stream()


def _gives(value: Any) -> Callable[..., Any]:
    return lambda *_, **__: value


def _no_statistics(*_: Any, **__: Any) -> collections.defaultdict[str, int]:
    return collections.defaultdict(int)


def install() -> None:
    """Replaces the functions, for good, before vLLM takes any of them by name."""
    shared = {
        "is_available": _gives(True),
        "device_count": _gives(1),
        "synchronize": synchronize,
        "empty_cache": _gives(None),
        "current_stream": _gives(_STREAM),
        "set_stream": _gives(None),
        "memory_stats": _no_statistics,
        "memory_reserved": _gives(0),
        "memory_allocated": _gives(0),
        "max_memory_allocated": _gives(0),
        "max_memory_reserved": _gives(0),
        "reset_peak_memory_stats": _gives(None),
        "get_device_capability": _gives((9, 0)),
    }
    cuda = {
        "is_initialized": _gives(True),
        "init": _gives(None),
        "_lazy_init": _gives(None),
        "_is_compiled": _gives(True),
        "current_device": _gives(0),
        "set_device": _gives(None),
        "get_device_name": _gives(Properties.name),
        "get_device_properties": _gives(Properties),
        "manual_seed": _gives(None),
        "manual_seed_all": _gives(None),
        "mem_get_info": _gives((_FREE, Properties.total_memory)),
        "default_stream": _gives(_STREAM),
        "current_blas_handle": _gives(0),
        "set_sync_debug_mode": _gives(None),
        "get_sync_debug_mode": _gives(0),
        "Stream": Stream,
        "Event": Event,
        "stream": StreamContext,
    }
    accelerator = {
        "current_accelerator": _gives(torch.device("cuda")),
        "current_device_index": _gives(0),
        "set_device_index": _gives(None),
        "device_index": _gives(contextlib.nullcontext()),
        "get_memory_info": _gives((_FREE, Properties.total_memory)),
        "empty_host_cache": _gives(None),
    }
    for name, value in (shared | cuda).items():
        setattr(torch.cuda, name, value)
    for name, value in (shared | accelerator).items():
        setattr(torch.accelerator, name, value)
    # Not the native one, whose settings vLLM would read and change.
    torch.cuda.memory.get_allocator_backend = _gives("cudaMallocAsync")
    # Imported by name by the compiler's modules, which are imported though never used.
    torch._C._cuda_getCurrentRawStream = _gives(0)
    torch.Generator = Generator  # type: ignore[misc]
    torch.Stream = Stream  # type: ignore[assignment, misc]
    torch.Event = Event  # type: ignore[assignment, misc]
