"""Launches that become compilations, for a GPU that need not be there.

Triton's own code for a launch looks at the arguments and decides what to compile; here it is told
that there is an H100 or H200, and is stopped before it would load what was compiled.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from vllm_sparse_plugin.paged.triton_kernels import grids

TARGET = GPUTarget("cuda", 90, 32)
_TOOL = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


class NoDriver:
    """What Triton asks of a driver before it compiles."""

    def get_current_target(self) -> GPUTarget:
        return TARGET

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0


@dataclass(frozen=True)
class Compiled:
    """What a kernel became.

    Attributes:
        name: Module and kernel.
        variant: What it was compiled for: types, alignment, constants and options.
        warps: Of a program.
        registers: Of a thread.
        stack_bytes: Of a thread: what did not fit its registers is there, and arrays whose places
            are not known. (How much of it are spills, ptxas alone knows.)
        shared_bytes: Of a program.
        async_copies: Loads into shared memory that a loop starts ahead.
        matrix_products: Instructions of tensor cores.
        fused: Products and sums in one instruction.
        wide_loads: Loads of 16 bytes.
        wide_stores: Likewise.
        waits_first: Whether it waits for earlier launches before it touches any memory but its
            arguments.
    """

    name: str
    variant: str
    warps: int
    registers: int
    stack_bytes: int
    shared_bytes: int
    async_copies: int
    matrix_products: int
    fused: int
    wide_loads: int
    wide_stores: int
    waits_first: bool


@dataclass(frozen=True)
class Launch:
    """What a launch would compile, if nothing like it had been compiled before."""

    kernel: JITFunction
    signature: dict[str, str]
    constants: dict[Any, Any]
    attributes: dict[Any, Any]
    options: Any

    @property
    def name(self) -> str:
        return f"{self.kernel.__module__.rsplit('.', 1)[1]}.{self.kernel.__name__}"

    @property
    def variant(self) -> str:
        parts = []
        for place, (name, kind) in enumerate(self.signature.items()):
            if kind == "constexpr":
                parts.append(f"{name}={self.constants[(place,)]}")
            else:
                parts.append(f"{name}:{kind}" + ("%16" if self.attributes.get((place,)) else ""))
        options = self.options
        return " ".join([*parts, f"stages={options.num_stages} fuse={options.enable_fp_fusion}"])

    def built(self) -> Any:
        """What Triton's compiler makes of it."""
        source = ASTSource(self.kernel, self.signature, self.constants, self.attributes)
        return triton.compile(source, target=TARGET, options=self.options.__dict__)

    def compiled(self) -> Compiled:
        result = self.built()
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(result.asm["cubin"])
            file.flush()
            command = [_TOOL, "-res-usage", file.name]
            usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        used = {name: int(size) for name, size in re.findall(r"(\w+):(\d+)", usage)}
        ptx = result.asm["ptx"]
        return Compiled(
            self.name,
            self.variant,
            warps=result.metadata.num_warps,
            registers=used["REG"],
            stack_bytes=used["STACK"] + used["LOCAL"],
            shared_bytes=result.metadata.shared,
            async_copies=len(re.findall("async_copy_global_to_local", result.asm["ttgir"])),
            matrix_products=len(re.findall(r"mma\.sync|wgmma\.mma_async", ptx)),
            fused=len(re.findall(r"\bfma\.rn\.f32\b", ptx)),
            wide_loads=len(re.findall(r"ld\.global\S*\.v4\.b32", ptx)),
            wide_stores=len(re.findall(r"st\.global\S*\.v4\.b32", ptx)),
            waits_first=_waits_first(ptx),
        )


def _waits_first(ptx: str) -> bool:
    begin, wait, _ = ptx.partition("griddepcontrol.wait")
    return bool(wait) and not re.search(r"\b(ld|st|atom|red|cp\.async)\S*\.global", begin)


@contextmanager
def recording() -> Iterator[dict[Any, Launch]]:
    """Launches inside only add to what would have to be compiled: once for each kind of launch."""
    found: dict[Any, Launch] = {}
    run = JITFunction.run

    def without_device(kernel: JITFunction, *arguments: Any, **named: Any) -> Any:
        return run(kernel, *arguments, **{**named, "warmup": True})

    def record(
        kernel: JITFunction,
        key: Any,
        signature: dict[str, str],
        device: int,
        constants: dict[Any, Any],
        options: Any,
        attributes: dict[Any, Any],
        warmup: bool,
    ) -> None:
        place = (kernel.__module__, kernel.__name__, key)
        found.setdefault(place, Launch(kernel, signature, constants, attributes, options))

    driver.set_active(NoDriver())
    with (
        mock.patch.object(JITFunction, "run", without_device),
        mock.patch.object(JITFunction, "_do_compile", record),
        mock.patch.object(grids, "can_overlap", return_value=True),
    ):
        yield found


def compile_all(launches: Sequence[Launch], workers: int) -> Iterator[Compiled]:
    """In threads: Triton's compiler and ptxas leave the interpreter to others meanwhile."""
    with ThreadPoolExecutor(workers) as pool:
        yield from pool.map(Launch.compiled, launches)
