"""A program: compiles kernels for a GPU that need not be there.

    python -m tests.plugin.triton.compile_launches [LAUNCHER ...]

Launches become compilations for compute capability 9.0; without names, of every launcher and in
several shapes. It prints each kernel, how far it got (`cubin`, or `ptx` without an assembler), its
bytes of shared memory, and its registers that did not fit.
"""

import itertools
import re
import sys
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction, mangle_type

from tests.plugin.triton.all_launches import launches

TARGET = GPUTarget("cuda", 90, 32)
OPTIONS = ("num_warps", "num_stages")
SHAPES = ((4, 128, torch.bfloat16), (1, 80, torch.float16), (7, 64, torch.float32))
_compiled: set[Any] = set()


def compile_launch(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **named: Any) -> None:
    """Instead of `JITFunction.run`."""
    options = {name: named.pop(name) for name in OPTIONS if name in named}
    values = dict(zip(kernel.arg_names, args, strict=False)) | named
    assert values.keys() == set(kernel.arg_names), kernel.__name__
    constants, signature, attributes = {}, {}, {}
    for place, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        if parameter.is_constexpr:
            constants[(place,)] = value
            signature[parameter.name] = "constexpr"
            continue
        signature[parameter.name] = parameter.annotation_type or mangle_type(value)
        # As at a launch: pointers are aligned, and most strides are multiples of 16.
        if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
            attributes[(place,)] = [["tt.divisibility", 16]]
    key = (kernel.__module__, kernel.__name__, str((signature, constants, attributes, options)))
    if key in _compiled:
        return
    _compiled.add(key)
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    result = triton.compile(source, target=TARGET, options=options)
    kind = "cubin" if "cubin" in result.asm else "ptx"
    name = f"{kernel.__module__.rsplit('.', 1)[1]}.{kernel.__name__}"
    copies = len(re.findall("async_copy_global_to_local", result.asm["ttgir"]))
    products = len(re.findall("mma.sync", result.asm["ptx"]))
    print(name, kind, f"shared={result.metadata.shared} copies={copies} mma={products}", flush=True)


def main(names: list[str]) -> None:
    JITFunction.run = compile_launch  # type: ignore[method-assign]
    if names:
        every = launches(*SHAPES[0], by_head=True, is_split=False)
        for name in names:
            every[name]()
        return
    for shape, by_head, is_split in itertools.product(SHAPES, (False, True), (False, True)):
        for launch in launches(*shape, by_head, is_split).values():
            launch()


if __name__ == "__main__":
    main(sys.argv[1:])
