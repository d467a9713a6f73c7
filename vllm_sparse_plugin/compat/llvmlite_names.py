"""numba's compiler library in a process where vLLM looks through all modules."""

from __future__ import annotations

from typing import Any

from llvmlite.binding import ffi

_MARK = "_sparse_attention_hook"


def hide_special_names() -> None:
    """Makes llvmlite's library object say that it has no `__dict__`.

    It answers to every name with a function of the library. vLLM, starting a CPU worker, asks the
    globals of all loaded modules for their `__dict__`, and fails on such an answer: a second engine
    of a process, whose first one has loaded numba, would not start.
    """
    library = type(ffi.lib)
    original = library.__getattr__
    if getattr(original, _MARK, False):
        return

    def get(self: Any, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return original(self, name)

    setattr(get, _MARK, True)
    library.__getattr__ = get
