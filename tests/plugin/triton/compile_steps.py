"""A program: compiles what steps of engines launch, for a GPU that need not be there.

    python -m tests.plugin.triton.compile_steps [--all] [--json]

It prints a line per kernel, and then the kernels that would be compiled late: in an engine that has
run steps of one query and of as many as it takes, by a step of any other number. With `--all`, in
all shapes, which takes some ten minutes.
"""

import argparse
import itertools
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch

from tests.plugin.triton.compiling import Compiled, Launch, compile_all, recording
from tests.plugin.triton.whole_steps import Engine, Steps, masker_lists

MODELS = ((32, 8, 128), (28, 4, 128), (32, 8, 64), (32, 8, 80), (28, 4, 64), (28, 4, 80))
QUERIES, PREFILL = (1, 8, 64), 8192
CASES = (
    (
        Engine(),
        (1, 64),
        (
            "quest 4, kv_head",
            "double sparsity 4, query_head",
            "double sparsity 4, kv_head",
            "hash silu, query_head",
            "quest, adaptive sampling, kv_head",
            "oracle, adaptive sampling, kv_head",
            "top p",
            "pq 6, kv_head",
            "magic pig 75 x 8",
        ),
    ),
    (
        Engine(28, 4, 80, torch.float16, 4096),
        (8,),
        ("quest 2, query_head", "oracle, adaptive sampling of others"),
    ),
    (Engine(32, 8, 64, torch.float16, 4096), (8,), ("quest 16, kv_head",)),
    (Engine(4, 2, 64, torch.float32, 4096), (8,), ("sampling, kv_head",)),
    (
        Engine(has_eight_bits=True),
        (64,),
        (
            "quest 4, kv_head",
            "quest 16, query_head",
            "double sparsity 4, kv_head",
            "double sparsity 16, query_head",
            "hash silu, kv_head",
            "oracle, adaptive sampling, kv_head",
            "pq 6, kv_head",
            "magic pig 75 x 8",
        ),
    ),
)
"""Those that differ most: split rows and others, lists of query heads and of KV heads, groups and
heads of no power of 2, caches of 8 bits."""


def launches_of(cases: Iterator[tuple[Engine, tuple[int, ...], str]]) -> list[Launch]:
    with tempfile.TemporaryDirectory() as folder, recording() as found:
        for engine, queries, name in cases:
            steps = Steps(engine, masker_lists(engine, Path(folder))[name])
            for number in queries:
                steps.step(number)
                steps.attend(number, number, changes=True)
            steps.write(PREFILL)
    return list(found.values())


def some_cases() -> Iterator[tuple[Engine, tuple[int, ...], str]]:
    for engine, queries, names in CASES:
        for name in names:
            yield engine, queries, name


def all_cases() -> Iterator[tuple[Engine, tuple[int, ...], str]]:
    types, capacities = (torch.bfloat16, torch.float16), (1 << 17, 4096)
    with tempfile.TemporaryDirectory() as folder:
        for model, dtype, capacity in itertools.product(MODELS, types, capacities):
            engine = Engine(*model, dtype=dtype, capacity=capacity)
            for name in masker_lists(engine, Path(folder)):
                yield engine, QUERIES, name


def late_launches() -> list[Launch]:
    """What steps of other sizes would compile after the smallest and the largest."""
    engine, late = Engine(), {}
    with tempfile.TemporaryDirectory() as folder:
        for maskers in masker_lists(engine, Path(folder)).values():
            steps = Steps(engine, maskers)
            with recording() as early:
                steps.step(1)
                steps.step(engine.max_queries)
                if steps.attention.learns:
                    steps.attend(1, 1, changes=True)
            with recording() as found:
                for queries in (2, 3, 5, 16, 17, 48, engine.max_queries):
                    steps.step(queries)
                    steps.attend(
                        queries, rows=queries, changes=True
                    )  # beside a prefill: a table of their own
                for tokens in (100, 1024, 1025, PREFILL):
                    steps.write(tokens)
            late |= {key: launch for key, launch in found.items() if key not in early}
    return list(late.values())


def table_row(kernel: Compiled) -> str:
    numbers = (
        f"{kernel.warps} warps, {kernel.registers} registers",
        f"{kernel.stack_bytes} bytes of stack, {kernel.shared_bytes} shared",
        f"{kernel.async_copies} copies, {kernel.matrix_products} mma",
    )
    return f"{kernel.name:36} " + ", ".join(numbers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--all", action="store_true", help="every shape")
    parser.add_argument("--json", action="store_true", help="one object, with all that is known")
    options = parser.parse_args()
    launches = launches_of(all_cases() if options.all else some_cases())
    compiled = compile_all(launches, workers=min(4, os.cpu_count() or 1))
    late = sorted({f"{launch.name} {launch.variant}" for launch in late_launches()})
    if options.json:
        print(json.dumps({"compiled": [asdict(kernel) for kernel in compiled], "late": late}))
        return
    for kernel in compiled:
        print(table_row(kernel), flush=True)
    print(f"late: {', '.join(late) or 'none'}")


if __name__ == "__main__":
    main()
