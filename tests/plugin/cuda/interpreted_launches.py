"""Launches of kernels in Triton's interpreter, which a graph can record.

Device memory is host memory here, so nothing is copied before and after a launch as Triton's own
launcher would do.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl
from triton.runtime import interpreter


@dataclass(frozen=True)
class Launch:
    """One launch, with everything that CUDA fixes when it is made.

    Attributes:
        function: The kernel, rewritten for the interpreter.
        arguments: By name: numbers and addresses of tensors.
        grid: Numbers of programs.
        tensors: Kept alive: the arguments have their addresses only.
    """

    function: Callable[..., Any]
    arguments: dict[str, Any]
    grid: tuple[int, int, int]
    tensors: tuple[torch.Tensor, ...]

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
    return Launch(
        function=executor.fn,
        arguments=arguments,
        grid=(*grid, 1, 1)[:3],
        tensors=tuple(value for value in given.values() if isinstance(value, torch.Tensor)),
    )


class _NothingToRestore:
    def restore(self) -> None:
        pass


def patch_language_once() -> None:
    """Lets `triton.language` compute with numpy for good.

    By itself the interpreter does so at each call of a function, which takes longer than the
    functions do.
    """

    def sees_both_modules() -> None:
        pass

    names = {"tl": tl, "core": tl.core}
    interpreter._patch_lang(type(sees_both_modules)(sees_both_modules.__code__, names))
    interpreter._patch_lang = lambda function: _NothingToRestore()


def install(launched: Callable[[Launch], None]) -> None:
    """Replaces Triton's launcher.

    Args:
        launched: Called with each launch, in its place.
    """

    def call(executor: Any, *args: Any, **kwargs: Any) -> None:
        launched(prepare(executor, args, kwargs))

    interpreter.GridExecutor.__call__ = call
