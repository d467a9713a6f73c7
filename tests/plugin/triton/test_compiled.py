"""What the interpreter cannot see: whether Triton can compile the kernels, and into what."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SHARED_BYTES = 227 << 10
"""That a program of an H100 may have."""
STACK_BYTES = 32
"""Of a thread: all but a few numbers fits its registers."""
KERNELS = 50
"""In the package: steps launch all of them."""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """By a process of its own: here, kernels are interpreted."""
    cache = tmp_path_factory.mktemp("cache")
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache), "TRITON_INTERPRET": "0"}
    result = subprocess.run(
        [sys.executable, "-m", "tests.plugin.triton.compile_steps", "--json"],
        env=environment,
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_every_kernel_compiles_and_has_room(report) -> None:
    compiled = report["compiled"]
    assert len({kernel["name"] for kernel in compiled}) == KERNELS
    for kernel in compiled:
        assert kernel["shared_bytes"] <= SHARED_BYTES, kernel
        assert kernel["stack_bytes"] <= STACK_BYTES, kernel


def test_instructions(report) -> None:
    for kernel in report["compiled"]:
        name, variant = kernel["name"], kernel["variant"]
        # Products and sums are fused where a kernel says so; else they are rounded in two steps.
        if name in (
            "channel_labels._label_queries",
            "channel_labels._write_labels",
            "page_bounds._update_pages",
        ):
            assert kernel["fused"] == 0, kernel
        # Rows come in words of 16 bytes, neighbouring tokens' signatures and flags too.
        if name in (
            "writing._write_rows",
            "page_scores._score_pages",
            "key_scores._score_keys",
            "signature_scores._score_signatures",
            "selection._select_kernel",
            "selection._order_kernel",
            "flags._pool_kernel",
            "flags._spread_kernel",
            "lists._count_kernel",
            "lists._list_kernel",
            "radix.count_kernel",
            "pooling._weigh_kernel",
            "pooling._share_kernel",
            "key_numbers._number_scores",
            "key_lists._choose_kernel",
        ):
            # But codes of 2 bits of 80 channels are 20 bytes.
            assert kernel["wide_loads"] > 0 or "PART=20" in variant, kernel
        if name.startswith("flags."):
            assert kernel["wide_stores"] > 0, kernel
        # Keys and values are loaded ahead, and multiplied on tensor cores.
        if name == "attention._attend_kernel":
            assert kernel["async_copies"] >= 2, kernel
            assert (kernel["matrix_products"] > 0) == ("IN_FLOAT32=False" in variant), kernel
        # Blocks and bounds too.
        if name == "page_scores._score_pages":
            assert kernel["async_copies"] >= 2, kernel
            assert (kernel["matrix_products"] > 0) == ("IN_FLOAT32=False" in variant), kernel


def test_launches_that_begin_early_wait_for_those_before(report) -> None:
    """First of all; and so those of a decode step of Quest and of Double Sparsity."""
    overlapped = {kernel["name"] for kernel in report["compiled"] if kernel["waits_first"]}
    for kernel in report["compiled"]:
        assert kernel["waits_first"] == ("IS_OVERLAPPED=True" in kernel["variant"]), kernel
    assert overlapped >= {
        "page_bounds._update_pages",
        "page_scores._score_pages",
        "page_lists._list_pages_kernel",
        "writing._write_rows",
        "channel_labels._write_labels",
        "channel_labels._label_queries",
        "label_scores._score_labels",
        "label_numbers._number_labels",
        "key_lists._list_kernel",
        "key_lists._choose_kernel",
        "attention._attend_kernel",
        "attention._join_kernel",
    }


def test_no_number_of_queries_is_compiled_for(report) -> None:
    """An engine that has run its smallest and its largest step has all it will ever launch."""
    assert report["late"] == []
