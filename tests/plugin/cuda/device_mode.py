"""Cuda tensors that are CPU tensors: what PyTorch is asked for on `cuda` is done on `cpu`.

Tensors of the device are told from the host's by their storages (`memory`). So copies between the
two are copies, although both are CPU tensors, and what CUDA refuses is refused.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils import _device

from tests.plugin.cuda import memory
from tests.plugin.cuda.memory import ON_DEVICE, PINNED

HOST = torch.device("cpu")
DEVICE = torch.device("cuda", 0)

CUSTOM_OPS: dict[str, Callable[..., Any]] = {}
"""Python implementations of custom ops by `namespace::name`: they are called as they are, since the
dispatcher would run them with the modes off."""


class CaptureError(RuntimeError):
    """CUDA would have refused this while a stream is captured."""

    def __init__(self, what: str) -> None:
        super().__init__(f"{what}: operation not permitted when stream is capturing")


class State:
    """What the function mode and the recorder of a capture tell each other.

    Attributes:
        capturing: Whether a graph is being captured.
        allocates_on_device: Whether the call under way was asked for a result on the device.
    """

    capturing = False
    allocates_on_device = False


def _is_cuda(value: Any) -> bool:
    if isinstance(value, torch.device):
        return value.type == "cuda"
    return isinstance(value, str) and (value == "cuda" or value.startswith("cuda:"))


def _is_device(value: Any) -> bool:
    return isinstance(value, torch.device) or (
        isinstance(value, str) and value.split(":")[0] in ("cpu", "cuda", "meta")
    )


def _on_host(value: Any) -> Any:
    return HOST if _is_cuda(value) else value


_HOST_READS = {
    torch.Tensor.item,
    torch.Tensor.tolist,
    torch.Tensor.__bool__,
    torch.Tensor.__int__,
    torch.Tensor.__float__,
    torch.Tensor.__index__,
    torch.Tensor.__contains__,
}
_FROM_HOST_VALUES = {torch.tensor, torch.as_tensor, torch.asarray}
_TO_NUMPY = {torch.Tensor.numpy, torch.Tensor.__array__}


class DeviceMode(TorchFunctionMode):
    """Active in the thread that believes in a GPU."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.device:
            return func(*args, **kwargs)
        first = args[0] if args and isinstance(args[0], torch.Tensor) else None
        special = _SPECIAL.get(func)
        if special is not None and first is not None:
            return special(first, *args[1:], **kwargs)
        if first is not None and first in ON_DEVICE:
            if func in _TO_NUMPY:
                raise TypeError("can't convert cuda:0 device type tensor to numpy")
            if State.capturing and func in _HOST_READS:
                raise CaptureError(func.__name__)
        implementation = CUSTOM_OPS.get(_op_name(func))
        if implementation is not None:
            with self:
                return implementation(*args, **kwargs)
        return self._on_cpu(func, args, kwargs)

    def _on_cpu(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Any:
        wanted = kwargs.get("device")
        if wanted is None:
            wanted = next((value for value in args if _is_device(value)), None)
        if wanted is None and func in _device._device_constructors():
            wanted = _device.CURRENT_DEVICE
            if _is_cuda(wanted):
                kwargs = {**kwargs, "device": HOST}
        on_device = memory.any_on_device((args, kwargs)) if wanted is None else _is_cuda(wanted)
        if on_device and wanted is not None:
            args = tuple(_on_host(value) for value in args)
            kwargs = {name: _on_host(value) for name, value in kwargs.items()}
            if State.capturing and func in _FROM_HOST_VALUES:
                raise CaptureError(f"a copy from unpinned memory ({func.__name__})")
        pinned = kwargs.get("pin_memory")
        if "pin_memory" in kwargs:
            kwargs = {name: value for name, value in kwargs.items() if name != "pin_memory"}
        before = State.allocates_on_device
        State.allocates_on_device = on_device
        try:
            result = func(*args, **kwargs)
        finally:
            State.allocates_on_device = before
        if on_device:
            if func in _FROM_HOST_VALUES and _shares_memory(result, args):
                result = result.clone()
            # What an op writes in place stays where it is: a copy to the host too.
            if func not in _HOST_RESULTS and not (args and result is args[0]):
                memory.mark_on_device(result)
        elif pinned:
            PINNED.add(result)
        return result


def _op_name(func: Any) -> str:
    if isinstance(func, torch._ops.OpOverloadPacket):
        return func._qualified_op_name
    if isinstance(func, torch._ops.OpOverload):
        return func._schema.name
    return ""


def _shares_memory(result: torch.Tensor, args: tuple[Any, ...]) -> bool:
    """Whether a tensor aliases a host tensor or a numpy array among the arguments."""
    source = args[0]
    if isinstance(source, torch.Tensor):
        return source not in ON_DEVICE and result.data_ptr() == source.data_ptr()
    return hasattr(source, "__array_interface__")


def copy_between(source: torch.Tensor, to_device: bool, non_blocking: bool) -> torch.Tensor:
    """A copy of a tensor on the other side.

    Raises:
        CaptureError: In a capture, where a copy must be from or to page-locked memory.
    """
    if State.capturing and not (to_device and non_blocking and source in PINNED):
        raise CaptureError("a copy between host and device")
    target = torch.empty_like(source)
    if to_device:
        ON_DEVICE.add(target)
    return target.copy_(source, non_blocking=non_blocking)


def _to(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Replaces `Tensor.to`."""
    here = tensor in ON_DEVICE
    wanted = kwargs.get("device")
    like = kwargs.get("other", args[0] if args else None)
    if wanted is None:
        wanted = next((value for value in args if _is_device(value)), None)
    if isinstance(like, torch.Tensor):
        there = like in ON_DEVICE
    else:
        there = here if wanted is None else _is_cuda(wanted)
    source = tensor
    if here != there:
        source = copy_between(tensor, there, _is_non_blocking(args, kwargs))
    before, State.allocates_on_device = State.allocates_on_device, there
    try:
        result = source.to(
            *[_on_host(value) for value in args],
            **{name: _on_host(value) for name, value in kwargs.items()},
        )
    finally:
        State.allocates_on_device = before
    if there:
        ON_DEVICE.add(result)
    return result


def _is_non_blocking(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    # The first flag is `non_blocking`, the second `copy`.
    flags = [value for value in args if isinstance(value, bool)]
    return bool(kwargs.get("non_blocking", flags[0] if flags else False))


def _cuda(
    tensor: torch.Tensor, device: Any = None, non_blocking: bool = False, **_: Any
) -> torch.Tensor:
    return tensor if tensor in ON_DEVICE else copy_between(tensor, True, non_blocking)


def _cpu(tensor: torch.Tensor, **_: Any) -> torch.Tensor:
    return copy_between(tensor, False, False) if tensor in ON_DEVICE else tensor


def _pin_memory(tensor: torch.Tensor, device: Any = None) -> torch.Tensor:
    if tensor in ON_DEVICE:
        raise RuntimeError("cannot pin a tensor of the device")
    if tensor in PINNED:
        return tensor
    pinned = tensor.clone()
    PINNED.add(pinned)
    return pinned


def _device_of(tensor: torch.Tensor) -> torch.device:
    if tensor in ON_DEVICE:
        return DEVICE
    with torch._C.DisableTorchFunctionSubclass():
        return torch.Tensor.device.__get__(tensor)


_SPECIAL: dict[Any, Callable[..., Any]] = {
    torch.Tensor.to: _to,
    torch.Tensor.cuda: _cuda,
    torch.Tensor.cpu: _cpu,
    torch.Tensor.pin_memory: _pin_memory,
    torch.Tensor.is_pinned: lambda tensor, device=None: tensor in PINNED,
    torch.Tensor.record_stream: lambda tensor, stream: None,
    torch.Tensor.device.__get__: _device_of,
    torch.Tensor.is_cuda.__get__: lambda tensor: tensor in ON_DEVICE,
    torch.Tensor.is_cpu.__get__: lambda tensor: _device_of(tensor).type == "cpu",
    torch.Tensor.get_device: lambda tensor: 0 if tensor in ON_DEVICE else -1,
}
_HOST_RESULTS = {torch.Tensor.untyped_storage, torch.Tensor.tolist}
