"""CUDA graphs that record what writes device memory, and do it again on the same memory.

As in a real graph, what the host computed during the capture is fixed: numbers passed to kernels,
shapes, grids, branches. A replay only runs the recorded ops and launches again, in order.

Not seen, although CUDA would complain or compute something else: reads of device memory that pass
PyTorch's Python layer by (through `data_ptr`, or in another thread), composite ops that synchronize
inside, and graphs that overwrite each other's results in a shared memory pool: here each keeps its
own memory.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.plugin.cuda import memory
from tests.plugin.cuda.device_mode import CaptureError, State
from tests.plugin.cuda.interpreted_launches import Launch
from tests.plugin.cuda.memory import ON_DEVICE, PINNED, tensors_in

_SYNCHRONIZING = {
    f"aten::{name}"
    for name in (
        "_local_scalar_dense",
        "item",
        "is_nonzero",
        "equal",
        "allclose",
        "nonzero",
        "nonzero_numpy",
        "argwhere",
        "masked_select",
        "_unique",
        "_unique2",
        "unique_dim",
        "unique_consecutive",
        "bincount",
    )
}
_ALLOCATIONS = {"aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty"}
_INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}


class Step:
    """Something that a replay does again."""

    def run(self) -> None:
        raise NotImplementedError


@dataclass(frozen=True)
class _Op(Step):
    """One ATen op.

    Attributes:
        function: The op.
        args: Of the call; tensors are views of the same memory.
        kwargs: Likewise.
        results: By their place among the results: those that the op had allocated. A replay writes
            to them what it computes anew.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    results: dict[int, torch.Tensor]

    def run(self) -> None:
        again = list(tensors_in(self.function(*self.args, **self.kwargs)))
        for place, result in self.results.items():
            result.copy_(again[place])


@dataclass(frozen=True)
class _AllReduce(Step):
    """A sum over ranks. By itself the op only starts it."""

    tensors: tuple[torch.Tensor, ...]
    group: Any

    def run(self) -> None:
        group = torch.distributed.ProcessGroup.unbox(self.group)
        group.allreduce(list(self.tensors)).wait()


@dataclass(frozen=True)
class _KernelLaunch(Step):
    launch: Launch

    def run(self) -> None:
        self.launch.run()


class Recorder(TorchDispatchMode):
    """Active during a capture."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self._paused = False

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Nothing is recorded inside, nor refused."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if self._paused:
            return func(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            return self._record(func, args, kwargs)

    def _record(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        inputs = list(tensors_in((args, kwargs)))
        on_device = [tensor in ON_DEVICE for tensor in inputs]
        uses_device = any(on_device)
        if uses_device:
            _refuse(func, args, inputs)
        baked_args, baked_kwargs = _bake(args), _bake(kwargs)
        result = func(*args, **kwargs)
        known = {tensor.untyped_storage()._cdata for tensor in inputs}
        fresh = {
            place: tensor.detach()
            for place, tensor in enumerate(tensors_in(result))
            if tensor.untyped_storage()._cdata not in known
        }
        if not (uses_device or (fresh and State.allocates_on_device)):
            return result
        memory.mark_on_device(tuple(fresh.values()))
        writes = func._schema.is_mutable and torch.Tag.inplace_view not in func.tags
        if func._schema.name == "c10d::allreduce_":
            self.steps.append(_AllReduce(tuple(baked_args[0]), args[1]))
        elif writes or (fresh and func._schema.name not in _ALLOCATIONS):
            self.steps.append(_Op(func, baked_args, baked_kwargs, fresh))
        return result


def _refuse(func: Any, args: tuple[Any, ...], inputs: list[torch.Tensor]) -> None:
    """Raises CaptureError where CUDA would, for an op with tensors on the device."""
    name = func._schema.name
    if name in _SYNCHRONIZING:
        raise CaptureError(name)
    if name == "aten::repeat_interleave" and func._overloadname != "self_int":
        raise CaptureError(name)
    if name in _INDEXING:
        values = args[2] if len(args) > 2 else None
        masks = [index for index in tensors_in(args[1]) if index.dtype in (torch.bool, torch.uint8)]
        # A single number is written through a mask, without counting the rows first.
        if masks and (values is None or values.numel() != 1):
            raise CaptureError(f"{name} with a mask")
    # A scalar of the host is an argument of the kernel.
    on_host = [tensor for tensor in inputs if tensor not in ON_DEVICE and tensor.dim() > 0]
    if not on_host:
        return
    if name == "aten::copy_":
        non_blocking = bool(args[2]) if len(args) > 2 else False
        if non_blocking and on_host[0] in PINNED:
            return
    elif name not in _INDEXING:
        raise RuntimeError(f"{name}: expected all tensors to be on the same device")
    raise CaptureError(f"{name}: a copy from or to unpinned memory, or one that is waited for")


def _bake(value: Any) -> Any:
    """An argument as a graph keeps it: addresses of tensors, values of everything else."""
    if isinstance(value, torch.Tensor):
        if value.dim() == 0 and value not in ON_DEVICE and value not in PINNED:
            return value.clone()
        return value.detach()
    if isinstance(value, (list, tuple)):
        return type(value)(_bake(item) for item in value)
    if isinstance(value, dict):
        return {name: _bake(item) for name, item in value.items()}
    return value


class DryGraph:
    """Replaces `torch.cuda.CUDAGraph`.

    Attributes:
        captured: Number of graphs captured in this process.
        replayed: Number of replays in this process.
    """

    captured: ClassVar[int] = 0
    replayed: ClassVar[int] = 0
    _recorder: ClassVar[Recorder | None] = None

    def __init__(self, keep_graph: bool = False) -> None:
        self.steps: list[Step] | None = None
        self._pool: tuple[int, int] | None = None

    def capture_begin(self, pool: tuple[int, int] | None = None, **_: Any) -> None:
        if DryGraph._recorder is not None:
            raise CaptureError("a second capture")
        self._pool = pool or graph_pool_handle()
        State.capturing = True
        DryGraph._recorder = Recorder()
        DryGraph._recorder.__enter__()

    def capture_end(self) -> None:
        recorder = DryGraph._recorder
        if recorder is None:
            raise RuntimeError("no capture is under way")
        recorder.__exit__(None, None, None)
        DryGraph._recorder = None
        State.capturing = False
        self.steps = recorder.steps
        DryGraph.captured += 1

    def replay(self) -> None:
        if self.steps is None:
            raise RuntimeError("Called CUDAGraph::replay without a preceding successful capture.")
        if State.capturing:
            raise CaptureError("a replay")
        DryGraph.replayed += 1
        # Results of a capture in inference mode can be written in inference mode only.
        with torch.inference_mode(), torch._C.DisableTorchFunction():
            for step in self.steps:
                step.run()

    def reset(self) -> None:
        self.steps = None

    def pool(self) -> tuple[int, int] | None:
        return self._pool

    def instantiate(self) -> None:
        pass

    def enable_debug_mode(self) -> None:
        pass

    def debug_dump(self, path: str) -> None:
        pass


class capture:
    """Replaces `torch.cuda.graph`, in lower case like it."""

    default_capture_stream = None

    def __init__(
        self,
        cuda_graph: DryGraph,
        pool: tuple[int, int] | None = None,
        stream: Any = None,
        **_: Any,
    ) -> None:
        self.graph = cuda_graph
        self.pool = pool

    def __enter__(self) -> None:
        self.graph.capture_begin(self.pool)

    def __exit__(self, kind: Any, *_: Any) -> None:
        self.graph.capture_end()
        if kind is not None:
            self.graph.reset()


_POOLS = iter(range(1, 1_000_000))


def graph_pool_handle() -> tuple[int, int]:
    return (0, next(_POOLS))


def launch(kernel: Launch) -> None:
    """Runs a Triton kernel, in the graph if one is captured.

    Raises:
        ValueError: An argument is a tensor that a GPU cannot read.
    """
    recorder = DryGraph._recorder
    unseen = recorder.paused() if recorder else contextlib.nullcontext()
    with torch._C.DisableTorchFunction(), unseen:
        for name, tensor in kernel.tensors:
            if tensor not in ON_DEVICE and tensor not in PINNED:
                raise ValueError(
                    f"Pointer argument {name} cannot be accessed from Triton (cpu tensor?)"
                )
        kernel.run()
    if recorder is not None:
        recorder.steps.append(_KernelLaunch(kernel))


def install() -> None:
    """Replaces the classes and functions of `torch.cuda`, for good."""
    replacements = {
        "CUDAGraph": DryGraph,
        "graph": capture,
        "graph_pool_handle": graph_pool_handle,
        "is_current_stream_capturing": lambda: State.capturing,
    }
    for name, value in replacements.items():
        setattr(torch.cuda, name, value)
        setattr(torch.cuda.graphs, name, value)
