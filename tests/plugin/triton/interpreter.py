"""Triton's interpreter for some tests of a process, and nothing left of it for the others.

Triton decides when a kernel is defined whether it will be interpreted, also for its own library
(`tl.sum`), and the interpreter replaces functions of `triton.language` for good. Here the kernels
alone are defined for it; while they run, so is the library, and then all is put back.
"""

import importlib
import os
import pkgutil
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from types import ModuleType
from typing import Any
from unittest import mock

import torch
import triton
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.jit import JITFunction

from tests.plugin.triton.replaced_parts import patch_language, replaced_parts

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
_SWITCH = {"TRITON_INTERPRET": "1"}


def import_interpreted(package: str) -> None:
    """Imports a package's modules so that their kernels are interpreted."""
    # The first launch would import it, in the middle of `interpreted`.
    with suppress(ImportError):
        importlib.import_module("triton.experimental.gluon")
    for name in [name for name in sys.modules if name.startswith(f"{package}.")]:
        del sys.modules[name]
    with mock.patch.dict(os.environ, _SWITCH):
        for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
            importlib.import_module(f"{package}.{module.name}")


def kernel_of(function: Callable[..., None]) -> Any:
    """A test's own kernel: interpreted where the package's are."""
    with mock.patch.dict(os.environ, _SWITCH if DEVICE == "cpu" else {}):
        return triton.jit(function)


@contextmanager
def interpreted() -> Iterator[None]:
    """Runs interpreted kernels inside."""
    places: list[ModuleType | type] = [tl, tl.core, tl.standard, tl.math, tl.tensor, tl.dtype]
    places += [tl.condition, tl.core.tensor_descriptor_base]
    before = [(place, dict(vars(place))) for place in places]
    for module in (tl, tl.standard):
        for name, value in list(vars(module).items()):
            if isinstance(value, JITFunction):
                setattr(module, name, interpreter.InterpretedFunction(value.fn))
    patch_language()
    try:
        with (
            mock.patch.dict(os.environ, _SWITCH),
            ExitStack() as replaced,
        ):
            for place, name, value in replaced_parts():
                replaced.enter_context(mock.patch.object(place, name, value))
            yield
    finally:
        # Functions that were rewritten know names that are about to go.
        interpreter.InterpretedFunction.rewritten_fn.clear()
        for place, attributes in before:
            for name in set(vars(place)) - set(attributes):
                delattr(place, name)
            for name, value in attributes.items():
                if vars(place)[name] is not value:
                    setattr(place, name, value)
