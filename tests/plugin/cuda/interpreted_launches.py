"""Launches of kernels in Triton's interpreter, which a graph can record.

Device memory is host memory here, so nothing is copied before and after a launch as Triton's own
launcher would do.
"""

import dataclasses
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from triton.runtime import interpreter

from tests.plugin.cuda.memory import tensors_in
from tests.plugin.triton.replaced_parts import patch_language, replaced_parts


@dataclass(frozen=True)
class Launch:
    """One launch, with everything that CUDA fixes when it is made.

    Attributes:
        function: The kernel, rewritten for the interpreter.
        arguments: By name: numbers and addresses of tensors.
        grid: Numbers of programs.
        tensors: With their names, kept alive: the arguments have their addresses only.
    """

    function: Callable[..., Any]
    arguments: dict[str, Any]
    grid: tuple[int, int, int]
    tensors: tuple[tuple[str, torch.Tensor], ...]

    def run(self) -> None:
        builder = interpreter.interpreter_builder
        builder.set_grid_dim(*self.grid)
        for x in range(self.grid[0]):
            for y in range(self.grid[1]):
                for z in range(self.grid[2]):
                    builder.set_grid_idx(x, y, z)
                    self.function(**self.arguments)


def prepare(executor: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Launch:
    """What `GridExecutor.__call__` does before the first program."""
    names = inspect.getfullargspec(executor.fn)
    known = {*names.args, *names.kwonlyargs}
    kwargs = {name: value for name, value in kwargs.items() if name in known}
    for hook in executor.pre_run_hooks:
        hook(*args, **kwargs)
    given = inspect.getcallargs(executor.fn, *args, **kwargs)
    arguments = {
        name: value if name in executor.constexprs else interpreter._implicit_cvt(value)
        for name, value in given.items()
    }
    grid = tuple(executor.grid(arguments) if callable(executor.grid) else executor.grid)
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor):  # vLLM's convolutions put them there with the grid
            given[name], arguments[name] = value, interpreter._implicit_cvt(value)
    COMPILED.add(_variant(executor, given))
    return Launch(
        function=executor.fn,
        arguments=arguments,
        grid=(*grid, 1, 1)[:3],
        tensors=tuple(
            (name, tensor) for name, value in given.items() for tensor in tensors_in(value)
        ),
    )


COMPILED: set[str] = set()
"""What Triton would have compiled for the launches of this process, if it were not interpreted."""


def _variant(executor: Any, given: dict[str, Any]) -> str:
    """A kernel with what it is compiled for, but for the alignment of its arguments."""
    parts = [
        f"{name}={value}" if name in executor.constexprs else f"{name}:{value.dtype}"
        for name, value in given.items()
        if name in executor.constexprs or isinstance(value, torch.Tensor)
    ]
    return f"{executor.fn.__module__}.{executor.fn.__name__} {' '.join(parts)}"


def _accept_integer_masks(builder: type, name: str, place: int) -> None:
    """Masks that are results of `&` may be integers here; compiled, they are bits."""
    original = getattr(builder, name)

    def call(self: Any, *args: Any) -> Any:
        args[place].data = args[place].data.astype(np.bool_)
        return original(self, *args)

    setattr(builder, name, call)


def patch_language_once() -> None:
    """Lets `triton.language` compute with numpy, for good, and find no integers that overflow."""
    patch_language()
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    _accept_integer_masks(type(builder), "create_masked_load", 1)
    _accept_integer_masks(type(builder), "create_masked_store", 2)
    # Lanes that are masked off compute too, with whatever is there.
    np.seterr(all="ignore")
    for place, name, value in tuple(replaced_parts()):
        setattr(place, name, value)


def launcher(launched: Callable[[Launch], None]) -> Callable[..., None]:
    """What can stand for `GridExecutor.__call__`.

    Args:
        launched: Called with each launch, to run it.
    """

    def call(executor: Any, *args: Any, **kwargs: Any) -> None:
        launched(prepare(executor, args, kwargs))

    return call


def install(launched: Callable[[Launch], None]) -> None:
    """Replaces Triton's launcher, for good."""
    interpreter.GridExecutor.__call__ = launcher(launched)
