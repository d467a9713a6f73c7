"""Operations of Triton's interpreter that are recorded when they are first met, and then repeated.

For each `a + b` the interpreter finds out anew which types are computed with, what is converted and
what is spread over a block; for small blocks that takes far longer than numpy's addition. All of it
follows from the types. So an operation is recorded once for each kind of arguments, as the calls of
the interpreter's builder that it makes, and from then on these calls alone are made: in the same
order, on the same classes of numbers, with the same results.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from types import ModuleType
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import (
    InterpreterBuilder,
    TensorHandle,
    interpreter_builder,
    interpreter_semantic,
)

from tests.plugin.triton.quick_handles import quick_handle

_BINARY = (
    *("add", "sub", "mul", "truediv", "floordiv", "mod"),
    *("and", "or", "xor", "lshift", "rshift"),
)
_OF_TENSORS = (
    *(f"__{side}{name}__" for name in _BINARY for side in ("", "r")),
    *("__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__"),
    *("__neg__", "__invert__", "__not__", "__getitem__"),
    *("logical_and", "logical_or", "to", "reshape", "trans"),
)
_OF_MODULES = (
    *("load", "store", "where", "minimum", "maximum", "arange", "full", "cast"),
    *("add", "sub", "mul", "fma", "div_rn", "dot"),
    *("expand_dims", "broadcast_to", "reshape", "trans", "permute", "join", "split"),
    *("abs", "exp", "exp2", "log", "log2", "sqrt", "ceil", "floor"),
)
OPERATIONS: tuple[tuple[ModuleType | type, tuple[str, ...]], ...] = (
    (tl.tensor, _OF_TENSORS),
    (tl, _OF_MODULES),
    (tl.core, _OF_MODULES),
    (tl.math, _OF_MODULES),
)
"""Where they are, and their names: what they do depends on memory and on their arguments alone."""

_MOST_KINDS = 4_096
"""Of arguments of an operation that are recorded: numbers count by their values."""


class _TellsFunction:
    """Stands for a builder whose methods for two numbers only say numpy's function for them."""

    @staticmethod
    def binary_op(left: None, right: None, function: np.ufunc) -> np.ufunc:
        return function


_OF_TWO: dict[str, np.ufunc] = {
    name: method(_TellsFunction, None, None)
    for name, method in vars(InterpreterBuilder).items()
    if inspect.isfunction(method) and method.__code__.co_names[:1] == ("binary_op",)
    if method.__name__ == "<lambda>"
}
"""By the names of the builder's methods that do nothing else."""

_HAVE_EFFECTS = {"create_store", "create_masked_store", "create_assert"}


class _CannotRepeat(Exception):
    """An argument, a call or a result that is not foreseen here."""


def operations() -> Iterator[tuple[ModuleType | type, str, Callable[..., Any]]]:
    """Places, names and what is to stand there, once `triton.language` computes with numpy."""
    for place, names in OPERATIONS:
        for name in names:
            operation = vars(place).get(name)
            if inspect.isfunction(operation):
                yield place, name, recorded(operation)
    for name in ("__bool__", "__index__"):
        yield tl.tensor, name, _noticed(vars(tl.tensor)[name])


def _noticed(look: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A way to look at a number, of which the recording learns that is being made."""

    @wraps(look)
    def call(tensor: Any) -> Any:
        if _RECORDERS and tensor.handle.data.size == 1:
            _RECORDERS[-1].looked_at.append(tensor.handle)
        return look(tensor)

    return call


def recorded(operation: Callable[..., Any]) -> Callable[..., Any]:
    """An operation of `triton.language` as the interpreter patches it, which is recorded."""
    repeated: dict[tuple[Any, ...], Callable[..., Any] | None] = {}

    @wraps(operation)
    def call(*args: Any, **kwargs: Any) -> Any:
        if _RECORDERS:  # of an operation that calls this one
            return operation(*args, **kwargs)
        values = (*args, *kwargs.values()) if kwargs else args
        try:
            key = _kinds(values)
        except _CannotRepeat:
            return operation(*args, **kwargs)
        if kwargs:
            key = (*kwargs, *key)
        known = repeated.get(key)
        if known is not None:
            return known(*values)
        if key in repeated or len(repeated) >= _MOST_KINDS or _are_shared(values):
            return operation(*args, **kwargs)
        with _recording() as recorder:
            result = operation(*args, **kwargs)
        try:
            repeated[key] = _program(values, recorder, result)
        except _CannotRepeat:
            repeated[key] = None
        return result

    return call


def _are_shared(values: tuple[Any, ...]) -> bool:
    """Whether two arguments are one, as in `a - a`: which one a call meant cannot be told."""
    handles = [id(value.handle) for value in values if _is_tensor(value)]
    return len(set(handles)) < len(handles)


_TENSOR = tl.tensor
_NUMBER = {int: int, bool: bool, str: str, type(None): type(None)}


def _kinds(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """Of all arguments; see `_kind`."""
    try:
        # Most are tensors whose types have been met.
        return tuple([one.type._key if one.__class__ is _TENSOR else _kind(one) for one in values])
    except AttributeError:
        return tuple(map(_kind, values))


def _kind(value: Any) -> Any:
    """What recordings of an argument depend on.

    Raises:
        _CannotRepeat: If that is unknown.
    """
    kind = type(value)
    if kind is tl.tensor:
        return _key(value.type)
    if kind is tl.constexpr:
        value = value.value
        kind = type(value)
    if kind in _NUMBER:
        return kind, value
    if kind is float:
        return value.hex()  # zeros of either sign, and numbers that are none
    if isinstance(value, tl.dtype):
        return tl.dtype, _key(value)
    if kind in (list, tuple):
        return kind, *map(_kind, value)
    if kind is slice and value == slice(None):
        return slice
    raise _CannotRepeat


_KEYS: dict[Any, int] = {}


def _key(kind: tl.dtype) -> int:
    """A number that equal types have in common; a block's attributes are those of its equals."""
    try:
        known: int = kind._key
    except AttributeError:
        if kind.is_block():
            name: Any = (_key(kind.element_ty), kind.shape)
        elif kind.is_ptr():
            name = (_key(kind.element_ty), kind.address_space, kind.const)
        else:
            name = str(kind)
        known = kind._key = _KEYS.setdefault(name, len(_KEYS))
    return known


_Step = tuple[str, tuple[Any, ...], Any]
"""Which of the builder's methods was called, its arguments and its result."""


class _Recorder:
    """A builder that remembers what it is asked."""

    def __init__(self, builder: Any) -> None:
        self._builder = builder
        self.steps: list[_Step] = []
        self.looked_at: list[TensorHandle] = []

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._builder, name)
        if not callable(attribute):
            return attribute

        def call(*args: Any) -> Any:
            result = attribute(*args)
            self.steps.append((name, args, result))
            return result

        return call


_RECORDERS: list[_Recorder] = []
"""The one that records now, if one does."""


@contextmanager
def _recording() -> Iterator[_Recorder]:
    builder = interpreter_semantic.builder
    recorder = _Recorder(builder)
    interpreter_semantic.builder = recorder
    _RECORDERS.append(recorder)
    try:
        yield recorder
    finally:
        _RECORDERS.pop()
        interpreter_semantic.builder = builder


def _program(values: tuple[Any, ...], recorder: _Recorder, result: Any) -> Callable[..., Any]:
    """A function of the arguments that makes the steps that matter.

    Raises:
        _CannotRepeat: If it could not be the same.
    """
    names = {id(value): f"a{place}" for place, value in enumerate(values)}
    tensors = {f"a{place}": value for place, value in enumerate(values) if _is_tensor(value)}
    handles = {id(value.handle): f"{name}.handle" for name, value in tensors.items()}
    constants: dict[str, Any] = {"_tensor": tl.tensor, "_new": tl.tensor.__new__}
    constants["_handle"] = quick_handle
    constants["_builder"] = interpreter_builder  # its methods may be replaced: see `races`

    def constant(value: Any) -> str:
        name = f"c{len(constants)}"
        constants[name] = value
        return name

    def argument(value: Any) -> str:
        if id(value) in handles:
            return handles[id(value)]
        if isinstance(value, TensorHandle):
            raise _CannotRepeat
        if isinstance(value, list | tuple) and any(isinstance(one, TensorHandle) for one in value):
            raise _CannotRepeat
        return constant(value)

    def direct(name: str, args: tuple[Any, ...], written: list[str], made: TensorHandle) -> str:
        """What the builder's method comes to for arrays of these types, if it can be said."""
        left, right = (handle.data for handle in args)
        if left.dtype == right.dtype == np.bool_:
            return ""  # bits that wrap around, unlike numpy's
        with np.errstate(all="ignore"):
            kind = _OF_TWO[name](left, right).dtype
        text = f"{constant(_OF_TWO[name])}({written[0]}.data, {written[1]}.data)"
        if kind != made.data.dtype:
            text += f".astype({constant(made.data.dtype)})"
        return f"_handle({text}, {constant(made.dtype)})"

    lines: list[tuple[str, str]] = []  # names, and what they are assigned: none for effects
    for place, (name, args, made) in enumerate(recorder.steps):
        written = [argument(value) for value in args]
        parts = made if isinstance(made, tuple) else (made,)
        if not any(isinstance(part, TensorHandle) for part in parts):
            if name in _HAVE_EFFECTS:
                lines.append(("", f"_builder.{name}({', '.join(written)})"))
            continue  # a type, which is there when it is asked for
        if not any(one.startswith(("a", "s")) for one in written):
            for part in parts:  # numbers that never change
                part.data.flags.writeable = False
                handles[id(part)] = constant(part)
            continue
        targets = [f"s{place}_{number}" for number in range(len(parts))]
        handles.update(zip(map(id, parts), targets, strict=True))
        text = f"_builder.{name}({', '.join(written)})"
        if name in _OF_TWO:
            text = direct(name, args, written, made) or text
        lines.append((", ".join(targets), text))

    # What was done may depend on them, as in `tl.load(..., other=tensor)`.
    if any(not argument(handle).startswith("c") for handle in recorder.looked_at):
        raise _CannotRepeat
    made_tensors: list[str] = []

    def returned(value: Any) -> str:
        if value is None:
            return "None"
        if isinstance(value, tuple):
            return f"({', '.join(map(returned, value))},)"
        if not _is_tensor(value):
            raise _CannotRepeat
        if id(value) in names:
            return names[id(value)]
        name = f"r{len(made_tensors)}"
        made_tensors.append(
            f"{name} = _new(_tensor); {name}.handle = {argument(value.handle)};"
            f" {name}.type = {constant(value.type)}; {name}.shape = {constant(value.shape)};"
            f" {name}.numel = {constant(value.numel)}; {name}.dtype = {constant(value.dtype)}"
        )
        return name

    answer = returned(result)
    body = [*made_tensors, f"return {answer}"]
    for targets, text in reversed(lines):
        is_used = any(target in line for target in targets.split(", ") for line in body)
        if is_used or not targets:
            body.insert(0, f"{targets} = {text}" if targets else text)
    source = f"def repeat({', '.join(f'a{place}' for place in range(len(values)))}):\n    "
    exec(source + "\n    ".join(body), constants)
    function: Callable[..., Any] = constants["repeat"]
    return function


def _is_tensor(value: Any) -> bool:
    return type(value) is tl.tensor
