"""Sixteen float32s at once, as a type of numba's: kernels say which numbers stay in registers.

Compilers turn plain loops over a row into vector instructions, but neither keep several rows' sums
in registers nor use a loaded row for several query heads. Measured on 32 query and 8 KV heads of
128 channels, plain loops reached half of the memory's bandwidth or less. A processor with shorter
vectors does the same in several instructions.

Arrays are C-contiguous, and an index counts elements from an array's start: nothing is checked.
"""

from __future__ import annotations

from typing import Any

from llvmlite import binding as llvm
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.datamodel import models
from numba.core.extending import register_model
from numba.extending import intrinsic

from vllm_sparse_plugin.paged.kernels.compiled import compiled
from vllm_sparse_plugin.paged.kernels.rows import FLOAT16, FROM_FLOAT16

LANES = 16
_LINE_BYTES = 64


class _Vector(types.Type):  # type: ignore[misc]
    """Of `LANES` float32s."""

    def __init__(self) -> None:
        super().__init__(name="float32x16")


VECTOR = _Vector()
_FLOATS = ir.VectorType(ir.FloatType(), LANES)
_WORDS = ir.VectorType(ir.IntType(32), LANES)


@register_model(_Vector)
class _VectorModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, numba_type: Any) -> None:
        super().__init__(manager, numba_type, _FLOATS)


def _splat(builder: Any, value: Any, vector: Any) -> Any:
    one = builder.insert_element(
        ir.Constant(vector, ir.Undefined), value, ir.Constant(ir.IntType(32), 0)
    )
    zeros = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
    return builder.shuffle_vector(one, ir.Constant(vector, ir.Undefined), zeros)


def _words(number: int) -> Any:
    return ir.Constant(_WORDS, [number] * LANES)


def _address(context: Any, builder: Any, array_type: Any, array: Any, index: Any) -> Any:
    data = context.make_array(array_type)(context, builder, array).data
    return builder.gep(data, [index])


def _call(builder: Any, name: str, result: Any, arguments: list[Any], **options: Any) -> Any:
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(result, [argument.type for argument in arguments]), name
    )
    return builder.call(function, arguments, **options)


def _first_lanes(builder: Any, count: Any) -> Any:
    """A mask of the first `count` lanes."""
    lanes = ir.Constant(_WORDS, list(range(LANES)))
    limit = _splat(builder, builder.trunc(count, ir.IntType(32)), _WORDS)
    return builder.icmp_signed("<", lanes, limit)


def _vector_at(
    builder: Any, address: Any, item: Any, suffix: str, alignment: int, count: Any
) -> Any:
    """`LANES` items from an address on: all of them, or the first `count` and zeros."""
    vector = ir.VectorType(item, LANES)
    pointer = builder.bitcast(address, vector.as_pointer())
    if count is None:
        return builder.load(pointer, align=alignment)
    arguments = [
        pointer,
        ir.Constant(ir.IntType(32), alignment),
        _first_lanes(builder, count),
        ir.Constant(vector, [0] * LANES),
    ]
    return _call(builder, f"llvm.masked.load.v{LANES}{suffix}.p0", vector, arguments)


def _raw(context: Any, builder: Any, signature: Any, arguments: Any, count: Any) -> Any:
    """The elements of an array as they are stored; see `_vector_at`."""
    array_type = signature.args[0]
    address = _address(context, builder, array_type, arguments[0], arguments[1])
    width = array_type.dtype.bitwidth
    suffix = "f32" if array_type.dtype == types.float32 else f"i{width}"
    item = context.get_data_type(array_type.dtype)
    return _vector_at(builder, address, item, suffix, width // 8, count)


def _as_floats(builder: Any, array_type: Any, raw: Any, kind: Any) -> Any:
    """A cache's elements as float32, see `rows`."""
    if array_type.dtype == types.float32:
        return raw
    wide = builder.zext(raw, _WORDS)
    if array_type.dtype == types.uint8:
        # A float16 of the same sign and exponent is 2**8 times less. (In float32s, as below, most
        # numbers under 2**-6 would be subnormal, which takes processors several times as long.)
        rest = builder.shl(builder.and_(wide, _words(0x7F)), _words(7))
        sign = builder.shl(builder.and_(wide, _words(0x80)), _words(8))
        bits = builder.trunc(builder.or_(sign, rest), ir.VectorType(ir.IntType(16), LANES))
        halves = builder.bitcast(bits, ir.VectorType(ir.HalfType(), LANES))
        return builder.fmul(builder.fpext(halves, _FLOATS), ir.Constant(_FLOATS, [256.0] * LANES))
    # As in `rows`: exponents are 112 lower in float16, subnormals come right by the product.
    sign = builder.shl(builder.and_(wide, _words(0x8000)), _words(16))
    rest = builder.shl(builder.and_(wide, _words(0x7FFF)), _words(13))
    scale = ir.Constant(_FLOATS, [float(FROM_FLOAT16)] * LANES)
    as_half = builder.fmul(builder.bitcast(builder.or_(sign, rest), _FLOATS), scale)
    as_bfloat = builder.bitcast(builder.shl(wide, _words(16)), _FLOATS)
    is_half = builder.icmp_signed("==", kind, ir.Constant(kind.type, FLOAT16))
    return builder.select(is_half, as_half, as_bfloat)


@intrinsic  # type: ignore[untyped-decorator]
def load(typing_context: Any, array: Any, index: Any, kind: Any) -> Any:
    """`LANES` elements of a cache (see `rows`) from `index` on, as float32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        raw = _raw(context, builder, signature, arguments, None)
        return _as_floats(builder, signature.args[0], raw, arguments[2])

    return VECTOR(array, types.intp, types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def load_some(typing_context: Any, array: Any, index: Any, kind: Any, count: Any) -> Any:
    """The same of the first `count` elements, and zeros; nothing is read beyond them."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        raw = _raw(context, builder, signature, arguments, arguments[3])
        return _as_floats(builder, signature.args[0], raw, arguments[2])

    return VECTOR(array, types.intp, types.int64, types.int64), generate


def _code_floats(builder: Any, raw: Any, shift: Any, mask: Any) -> Any:
    wide = builder.zext(raw, _WORDS)
    shift, mask = (
        _splat(builder, builder.trunc(value, ir.IntType(32)), _WORDS) for value in (shift, mask)
    )
    return builder.sitofp(builder.and_(builder.lshr(wide, shift), mask), _FLOATS)


@intrinsic  # type: ignore[untyped-decorator]
def load_codes(typing_context: Any, array: Any, index: Any, shift: Any, mask: Any) -> Any:
    """`(byte >> shift) & mask` of `LANES` bytes of a uint8 array from `index` on, as float32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        raw = _raw(context, builder, signature, arguments, None)
        return _code_floats(builder, raw, arguments[2], arguments[3])

    return VECTOR(array, types.intp, types.int64, types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def load_some_codes(
    typing_context: Any, array: Any, index: Any, shift: Any, mask: Any, count: Any
) -> Any:
    """The same of the first `count` bytes, and zeros; nothing is read beyond them."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        raw = _raw(context, builder, signature, arguments, arguments[4])
        return _code_floats(builder, raw, arguments[2], arguments[3])

    return VECTOR(array, types.intp, types.int64, types.int64, types.int64), generate


HAS_LOOKUP = bool(llvm.get_host_cpu_features().get("avx512f"))
"""Whether the processor can look sixteen numbers up in a vector: `look_codes_up`."""


@intrinsic  # type: ignore[untyped-decorator]
def look_codes_up(typing_context: Any, table: Any, array: Any, index: Any, shift: Any) -> Any:
    """Lane `(byte >> shift) & 15` of a table, for `LANES` bytes of an array from `index` on.

    Only where the processor `HAS_LOOKUP`; elsewhere it gives the table, for code that never runs.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        table, array, index, shift = arguments
        if not HAS_LOOKUP:
            return table
        address = _address(context, builder, signature.args[1], array, index)
        raw = _vector_at(builder, address, ir.IntType(8), "i8", 1, None)
        steps = _splat(builder, builder.trunc(shift, ir.IntType(32)), _WORDS)
        lanes = builder.lshr(builder.zext(raw, _WORDS), steps)  # higher bits do not count
        return _call(builder, "llvm.x86.avx512.permvar.sf.512", _FLOATS, [table, lanes])

    return VECTOR(VECTOR, array, types.intp, types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def load_number(typing_context: Any, array: Any, index: Any) -> Any:
    """The float32 that lies in a uint8 array from byte `index` on, in every lane."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address = _address(context, builder, signature.args[0], arguments[0], arguments[1])
        pointer = builder.bitcast(address, ir.FloatType().as_pointer())
        return _splat(builder, builder.load(pointer, align=1), _FLOATS)

    return VECTOR(array, types.intp), generate


@intrinsic  # type: ignore[untyped-decorator]
def store(typing_context: Any, array: Any, index: Any, vector: Any) -> Any:
    """Writes a vector to a float32 array from `index` on."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address = _address(context, builder, signature.args[0], arguments[0], arguments[1])
        pointer = builder.bitcast(address, _FLOATS.as_pointer())
        builder.store(arguments[2], pointer, align=4)
        return context.get_dummy_value()

    return types.void(array, types.intp, VECTOR), generate


@intrinsic  # type: ignore[untyped-decorator]
def fetch(typing_context: Any, array: Any, index: Any) -> Any:
    """Asks for the line of memory of the element at `index`, which need not exist.

    As something that is read once ("non-temporal"): where memory was fast, pages of keys came a
    fifth faster than by way of the second-level cache, and rows of single keys a quarter.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address = _address(context, builder, signature.args[0], arguments[0], arguments[1])
        byte = ir.IntType(8).as_pointer()
        flags = [ir.Constant(ir.IntType(32), flag) for flag in (0, 0, 1)]  # read, once, data
        pointer = builder.bitcast(address, byte)
        _call(builder, "llvm.prefetch.p0", ir.VoidType(), [pointer, *flags])
        return context.get_dummy_value()

    return types.void(array, types.intp), generate


@intrinsic  # type: ignore[untyped-decorator]
def store_some(typing_context: Any, array: Any, index: Any, vector: Any, count: Any) -> Any:
    """Writes the first `count` numbers of a vector; nothing is touched beyond them."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address = _address(context, builder, signature.args[0], arguments[0], arguments[1])
        vector_arguments = [
            arguments[2],
            builder.bitcast(address, _FLOATS.as_pointer()),
            ir.Constant(ir.IntType(32), 4),
            _first_lanes(builder, arguments[3]),
        ]
        _call(builder, f"llvm.masked.store.v{LANES}f32.p0", ir.VoidType(), vector_arguments)
        return context.get_dummy_value()

    return types.void(array, types.intp, VECTOR, types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def splat(typing_context: Any, number: Any) -> Any:
    """A float32 in every lane."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _splat(builder, arguments[0], _FLOATS)

    return VECTOR(types.float32), generate


@intrinsic  # type: ignore[untyped-decorator]
def multiply_add(typing_context: Any, a: Any, b: Any, c: Any) -> Any:
    """`a * b + c`, rounded once where the processor can."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _call(builder, f"llvm.fmuladd.v{LANES}f32", _FLOATS, list(arguments))

    return VECTOR(VECTOR, VECTOR, VECTOR), generate


@intrinsic  # type: ignore[untyped-decorator]
def multiply_then_add(typing_context: Any, a: Any, b: Any, c: Any) -> Any:
    """`a * b + c`, rounded after each step as tensor libraries do."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        a, b, c = arguments
        return builder.fadd(builder.fmul(a, b), c)

    return VECTOR(VECTOR, VECTOR, VECTOR), generate


@intrinsic  # type: ignore[untyped-decorator]
def add(typing_context: Any, a: Any, b: Any) -> Any:
    """`a + b`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fadd(*arguments)

    return VECTOR(VECTOR, VECTOR), generate


@intrinsic  # type: ignore[untyped-decorator]
def larger(typing_context: Any, a: Any, b: Any) -> Any:
    """The larger of each two lanes; none may be NaN."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        a, b = arguments
        return builder.select(builder.fcmp_ordered(">", a, b), a, b)

    return VECTOR(VECTOR, VECTOR), generate


@intrinsic  # type: ignore[untyped-decorator]
def rounded_down(typing_context: Any, a: Any) -> Any:
    """The integers below, as float32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _call(builder, f"llvm.floor.v{LANES}f32", _FLOATS, list(arguments))

    return VECTOR(VECTOR), generate


@intrinsic  # type: ignore[untyped-decorator]
def times_power_of_2(typing_context: Any, a: Any, power: Any) -> Any:
    """`a * 2**power`, for integers from -126 to 127 (as float32)."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        exponent = builder.add(builder.fptosi(arguments[1], _WORDS), _words(127))
        factor = builder.bitcast(builder.shl(exponent, _words(23)), _FLOATS)
        return builder.fmul(arguments[0], factor)

    return VECTOR(VECTOR, VECTOR), generate


@intrinsic  # type: ignore[untyped-decorator]
def total(typing_context: Any, vector: Any) -> Any:
    """The sum of the lanes, in an order that is always the same."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        value, width = arguments[0], LANES
        while width > 1:  # halves on halves
            width //= 2
            order = [lane + width if lane < width else lane for lane in range(LANES)]
            mask = ir.Constant(_WORDS, order)
            value = builder.fadd(value, builder.shuffle_vector(value, value, mask))
        return builder.extract_element(value, ir.Constant(ir.IntType(32), 0))

    return types.float32(VECTOR), generate


@compiled()
def fetch_bytes(records: Any, start: int, count: int) -> None:
    """`fetch`es `count` bytes of a uint8 array from byte `start` on."""
    for byte in range(0, count, _LINE_BYTES):
        fetch(records, start + byte)


@compiled(inline=True)
def load_part(array: Any, index: int, kind: int, left: int) -> Any:
    """The next `LANES` elements of a row, or as many as it has left, and zeros."""
    if left >= LANES:
        return load(array, index, kind)
    return load_some(array, index, kind, left)


@compiled(inline=True)
def load_codes_part(array: Any, index: int, shift: int, mask: int, left: int) -> Any:
    """The next `LANES` codes of a row, or as many as it has left, and zeros."""
    if left >= LANES:
        return load_codes(array, index, shift, mask)
    return load_some_codes(array, index, shift, mask, left)
