"""Recorded operations of the interpreter against what it does by itself, memory included."""

import itertools
import operator
from typing import Any

import numpy as np
import pytest
import triton.language as tl
from triton.runtime.interpreter import TensorHandle, _get_np_dtype

from tests.plugin.triton.interpreter import DEVICE
from tests.plugin.triton.recorded_operations import recorded

pytestmark = pytest.mark.skipif(DEVICE == "cuda", reason="nothing is interpreted there")

TYPES = [tl.int1, tl.int32, tl.uint8, tl.int64, tl.float16, tl.float32]
SHAPES: list[tuple[int, ...]] = [(), (4,), (1, 4), (2, 1)]
NUMBERS = [0, 1, -3, 5, 300, 2**31, 2**40, 0.0, -0.0, 0.5, 1e300, float("inf"), True]
OPERATORS = [
    *(operator.add, operator.sub, operator.mul, operator.truediv, operator.floordiv, operator.mod),
    *(operator.and_, operator.or_, operator.xor, operator.lshift, operator.rshift),
    *(operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge),
]


def tensor(kind: Any, shape: tuple[int, ...], seed: int) -> Any:
    numbers = np.random.default_rng(seed).integers(1, 7, shape or (1,))
    handle = TensorHandle(numbers.astype(_get_np_dtype(kind)), kind)
    return tl.tensor(handle, tl.block_type(kind, list(shape)) if shape else kind)


def outcome(operation: Any, *args: Any, **kwargs: Any) -> Any:
    """What it returns, or the error that it raises."""
    with np.errstate(all="ignore"):
        try:
            result = operation(*args, **kwargs)
        except Exception as error:
            return type(error), str(error)
    results = result if isinstance(result, tuple) else (result,)
    return [
        (
            str(one.type),
            str(one.handle.dtype.scalar),
            one.handle.data.dtype,
            repr(one.handle.data.tolist()),  # numbers that are none are equal here
            [size.value for size in one.shape],
            one.numel.value,
        )
        for one in results
    ]


def plain(operation: Any) -> Any:
    """An operator on tensors as the interpreter has it."""

    def call(left: Any, right: Any) -> Any:
        name = operation.__name__.strip("_")
        if isinstance(left, tl.tensor):
            return vars(tl.tensor)[f"__{name}__"].__wrapped__(left, right)
        swapped = {"lt": "gt", "le": "ge", "gt": "lt", "ge": "le", "eq": "eq", "ne": "ne"}
        name = swapped.get(name, f"r{name}")
        return vars(tl.tensor)[f"__{name}__"].__wrapped__(right, left)

    return call


@pytest.mark.parametrize("operation", OPERATORS, ids=lambda one: one.__name__)
def test_operators(operation: Any) -> None:
    pairs = [
        *itertools.product(itertools.product(TYPES, SHAPES), repeat=2),
        *itertools.product(itertools.product(TYPES, [(), (4,)]), NUMBERS),
        *itertools.product(NUMBERS, itertools.product(TYPES, [(), (4,)])),
    ]
    compared = 0
    for left, right in pairs:
        for seed in (1, 2):  # recorded, and repeated with other numbers
            args = [
                tensor(*one, seed + place) if isinstance(one, tuple) else one
                for place, one in enumerate((left, right))
            ]
            expected = outcome(plain(operation), *args)
            assert outcome(operation, *args) == expected, (left, right)
            compared += isinstance(expected, list)
    assert compared > 200


def test_numbers_that_are_equal_are_not_the_same() -> None:
    x = tensor(tl.float32, (4,), 1)
    signs = [np.signbit((x * zero).handle.data).any() for zero in (0.0, -0.0, 0.0)]
    assert signs == [False, True, False]
    assert [str((tensor(tl.int32, (4,), 1) * one).dtype) for one in (1, 1.0, True)] == [
        *("int32", "fp32", "int32")
    ]


@pytest.mark.parametrize(
    ("name", "args", "kwargs"),
    [
        ("where", (("int1", (4,)), ("fp32", (4,)), 0.5), {}),
        ("where", (("int1", (2, 1)), ("fp32", (1, 4)), ("int32", ())), {}),
        ("minimum", (("fp32", (4,)), 2), {}),
        ("maximum", (("int32", (4,)), ("int64", ())), {}),
        ("cast", (("fp32", (4,)), tl.int32), {}),
        ("cast", (("fp32", (4,)), tl.int32), {"bitcast": True}),
        ("expand_dims", (("fp32", (4,)), 1), {}),
        ("broadcast_to", (("fp32", (1, 4)), [2, 4]), {}),
        ("full", ([2, 4], 3, tl.int64), {}),
        ("full", ([2], ("fp32", ()), tl.float32), {}),
        ("arange", (0, 8), {}),
        ("join", (("fp32", (4,)), ("fp32", (4,))), {}),
        ("fma", (("fp32", (4,)), ("fp32", (4,)), 1.0), {}),
        ("abs", (("fp32", (4,)),), {}),
        ("exp2", (("fp32", (4,)),), {}),
    ],
)
def test_functions(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    function = getattr(tl, name)
    kinds = {str(kind): kind for kind in TYPES}
    for seed in (1, 2, 3):
        made = [
            tensor(kinds[one[0]], one[1], seed + place) if isinstance(one, tuple) else one
            for place, one in enumerate(args)
        ]
        expected = outcome(function.__wrapped__, *made, **kwargs)
        assert isinstance(expected, list)
        assert outcome(function, *made, **kwargs) == expected


def test_shapes_are_told_apart() -> None:
    for shape in ([2, 4], [4, 2], [8]):
        assert tl.full(shape, 1, tl.int32).handle.data.shape == tuple(shape)
        assert tl.broadcast_to(tensor(tl.int32, (1,), 1), [8]).handle.data.shape == (8,)


def test_arguments_that_are_one_are_told_from_two() -> None:
    subtract, choose = recorded(lambda one, other: one - other), recorded(vars(tl)["where"])
    x, y, c = (tensor(tl.int32, (4,), seed) for seed in (1, 2, 3))
    x, y, c = x * 10, y * 3, c > 3
    for one, other in ((x, x), (x, y), (y, y), (y, x)):
        difference = one.handle.data - other.handle.data
        assert subtract(one, other).handle.data.tolist() == difference.tolist()
        chosen = np.where(c.handle.data, one.handle.data, other.handle.data)
        assert choose(c, one, other).handle.data.tolist() == chosen.tolist()


def test_what_is_looked_at_is_not_recorded() -> None:
    """What an operation does may follow from the value of an argument, then."""
    memory = np.arange(5, 9, dtype=np.int32)
    kind = tl.pointer_type(tl.int32)
    start = tl.tensor(TensorHandle(np.array([memory.ctypes.data], dtype=np.uint64), kind), kind)
    for value in (0, 5, 0, -1):
        other = tl.full([], value, tl.int32)
        for mask in (value > 9, other > 9):
            assert tl.load(start, mask=mask, other=other).handle.data.tolist() == [value]
    x = tl.full([2], 1.0, tl.float32)
    for bitcast in (True, False, True):
        expected = [0x3F800000] * 2 if bitcast else [1, 1]
        assert (
            x.to(tl.int32, bitcast=tl.full([], bitcast, tl.int1)).handle.data.tolist() == expected
        )


def test_memory_is_read_and_written_each_time() -> None:
    memory = np.arange(8, dtype=np.float32)
    kind = tl.pointer_type(tl.float32)
    start = tl.tensor(TensorHandle(np.array([memory.ctypes.data], dtype=np.uint64), kind), kind)
    for step in range(4):
        places = start + tl.arange(0, 8)
        is_even = tl.arange(0, 8) % 2 == step % 2
        read = tl.load(places, mask=is_even, other=-1.0)
        before = memory.copy()
        assert read.handle.data.tolist() == np.where(is_even.handle.data, memory, -1).tolist()
        tl.store(places, read * 2, mask=is_even)
        assert memory.tolist() == np.where(is_even.handle.data, 2 * before, before).tolist()


def test_what_was_recorded_is_not_asked_again() -> None:
    asked = []

    def twice(one: Any) -> Any:
        asked.append(str(one.type))
        return one + one

    operation = recorded(twice)
    for shape in ((4,), (4,), (2, 1), (4,), (2, 1)):
        for seed in (1, 2):
            x = tensor(tl.float32, shape, seed)
            assert operation(x).handle.data.tolist() == (2 * x.handle.data).tolist()
    assert len(asked) == 2


def test_what_cannot_be_repeated_is_asked_each_time() -> None:
    asked = []

    def counted(one: Any) -> int:
        asked.append(one)
        return len(asked)

    operation = recorded(counted)
    x = tensor(tl.float32, (4,), 1)
    assert [operation(x), operation(x), operation(object())] == [1, 2, 3]
