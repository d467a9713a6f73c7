"""Which CPU tensors stand for tensors of a GPU, and which for page-locked ones of the host."""

from collections.abc import Iterator
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

_SWEEP_EVERY = 4096


class StorageSet:
    """A set of tensor storages that keeps none of them alive."""

    def __init__(self) -> None:
        # The weak reference keeps the address from being given to another storage.
        self._storages: dict[int, StorageWeakRef] = {}
        self._sweep_at = _SWEEP_EVERY

    def add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self._storages:
            return
        self._storages[storage._cdata] = StorageWeakRef(storage)
        if len(self._storages) >= self._sweep_at:
            alive = {key: ref for key, ref in self._storages.items() if not ref.expired()}
            self._storages = alive
            self._sweep_at = 2 * len(alive) + _SWEEP_EVERY

    def __contains__(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._storages


ON_DEVICE = StorageSet()
PINNED = StorageSet()


def tensors_in(values: Any) -> Iterator[torch.Tensor]:
    """Yields the tensors in (nested) arguments or results."""
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from tensors_in(value)
    elif isinstance(values, dict):
        yield from tensors_in(tuple(values.values()))


def any_on_device(values: Any) -> bool:
    return any(tensor in ON_DEVICE for tensor in tensors_in(values))


def mark_on_device(values: Any) -> None:
    for tensor in tensors_in(values):
        ON_DEVICE.add(tensor)


def view_of_host(tensor: torch.Tensor) -> torch.Tensor:
    """The device's view of page-locked host memory: another storage over the same bytes."""
    view = torch.from_numpy(tensor.numpy())
    ON_DEVICE.add(view)
    return view
