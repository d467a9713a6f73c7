"""What the interpreter cannot see: whether Triton can compile the kernels, and into what."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

KERNELS = {
    "_apply_layer",
    "_encode_keys",
    "_fill_tables",
    "_label_queries",
    "_note_codes",
    "_score_codes",
    "_score_keys",
    "_score_labels",
    "_score_pages",
    "_score_signatures",
    "_update_pages",
    "_write_labels",
    "_write_rows",
}


def test_kernels_compile_for_a_gpu(tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    result = subprocess.run(
        [sys.executable, "-m", "tests.plugin.triton.compile_kernels"],
        env=environment,
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    compiled = [json.loads(line) for line in result.stdout.splitlines()]
    assert {kernel["name"] for kernel in compiled} == KERNELS
    for kernel in compiled:
        assert "cubin" in kernel, kernel["name"]
        # Products and sums are fused where a kernel says so; else they are rounded in two steps.
        if kernel["name"] in ("_label_queries", "_write_labels", "_update_pages"):
            assert not re.search(r"\bfma\.rn\.f32\b", kernel["ptx"]), kernel["name"]
        # Rows come in words of 16 bytes, neighbouring tokens' signatures too.
        if kernel["name"] in ("_write_rows", "_score_pages", "_score_keys", "_score_signatures"):
            assert re.search(r"ld\.global\S*\.v4\.b32", kernel["ptx"]), kernel["name"]
