"""A program: what a scan of pages' bounds costs a processor of a GPU, counted from compiled code.

    python -m tests.plugin.triton.instruction_counts

For each width of bounds it counts the instructions in the loop over tiles, per page and KV head,
and tells for how many clocks they keep each unit of a processor busy; and how many clocks an H100
and an H200 have for a page if its bytes come at four fifths of a copy's bandwidth. Latencies are
not in it, nor is what a program does before its first tile.
"""

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

import torch
import triton

from tests.plugin.triton.compiling import Launch, recording
from tests.plugin.triton.whole_steps import META, Engine
from vllm_sparse_plugin.paged.layout import BlockLayout
from vllm_sparse_plugin.paged.page_bounds import STORED_BITS, PageBounds
from vllm_sparse_plugin.paged.triton_kernels.page_scores import score_pages

_TOOL = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
PROCESSORS, CLOCK = 132, 1.7e9
COPIED = {"H100": 3.0e12, "H200": 4.2e12}
"""Bytes per second that a copy reads and writes, about."""
SHARE = 0.8
ISSUED = 4.0
"""Instructions of a warp that a processor starts per clock."""
UNITS = {
    "integers": (2.0, "LOP3 PRMT SHF SEL FSEL ISETP FSETP PLOP3 LEA IADD3 VIADD FMNMX VIMNMX I2FP"),
    "floats": (4.0, "FFMA FMUL FADD IMAD HFMA2 HADD2 HMUL2 HMNMX2"),
    "conversions": (2.0, "I2F F2I F2F"),
    "memory": (1.0, "LDS LDSM STS STSM LDG STG LDGSTS SHFL ATOMS"),
    "matrices": (0.5, "HMMA"),
}
"""Per unit of a processor: instructions of a warp per clock, and which. From CUDA's programming
guide, for compute capability 9.0; matrix products, of 16 x 8 x 16, at half of the largest ones'
rate."""


def instructions(launch: Launch) -> list[tuple[str, str]]:
    """A kernel's instructions, each with the label before it, if any."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(launch.built().asm["cubin"])
        file.flush()
        command = [str(_TOOL), "-c", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found, label = [], ""
    for line in text.splitlines():
        if match := re.match(r"\s*(\.L_\S+):", line):
            label = match[1]
        elif match := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(.*?);", line):
            found.append((label, match[1]))
            label = ""
    return found


def loop_with_products(code: list[tuple[str, str]]) -> list[str]:
    """The instructions of the loop that has the most matrix products."""
    places = {label: place for place, (label, _) in enumerate(code) if label}
    loops = []
    for end, (_, text) in enumerate(code):
        target = re.search(r"^BRA.*`\((\.L_\S+)\)", text)
        if target and places.get(target[1], end) < end:
            loops.append([text for _, text in code[places[target[1]] : end + 1]])
    return max(loops, key=lambda loop: sum(text.startswith("HMMA") for text in loop))


def page_scan(engine: Engine, bits: int, queries: int = 8) -> tuple[Launch, int]:
    """The launch that scores all pages, and bytes of a page's record."""
    index = PageBounds(16, bits)
    layout, pages = BlockLayout(engine.shape, (index,)), engine.capacity // 16
    width = layout.bytes_per_token // engine.dtype.itemsize
    cache = torch.empty(
        64, engine.kv_heads, engine.block_size, width, dtype=engine.dtype, device=META
    )
    query = torch.empty(queries, engine.heads, engine.head_size, dtype=engine.dtype, device=META)
    ints = torch.empty(queries, dtype=torch.int32, device=META)
    table = torch.empty(queries, pages, dtype=torch.int32, device=META)
    scores = torch.empty(queries, engine.heads, pages, device=META)
    size = index.record_bytes(engine.shape)
    with recording() as found:
        score_pages(query, cache, layout.place_of(index), size, 16, bits, table, ints, ints, scores)
    return next(iter(found.values())), size


def main() -> None:
    engine = Engine(capacity=32768)
    for bits in STORED_BITS:
        launch, size = page_scan(engine, bits)
        names = {
            launch.kernel.arg_names[place[0]]: value for place, value in launch.constants.items()
        }
        per_page = launch.options.num_warps / names["PAGES"]
        counts = Counter(
            text.split()[0].split(".")[0] for text in loop_with_products(instructions(launch))
        )
        clocks = {"all": counts.total() * per_page / ISSUED}
        for unit, (rate, kinds) in UNITS.items():
            clocks[unit] = sum(counts[kind] for kind in kinds.split()) * per_page / rate
        size += 4 * engine.heads // engine.kv_heads  # scores
        total = counts.total() * per_page
        print(f"{bits} bits, {size} bytes a page: {total:.1f} instructions of a warp")
        print("  clocks:", ", ".join(f"{unit} {count:.1f}" for unit, count in clocks.items()))
        there = {name: size * PROCESSORS * CLOCK / (SHARE * rate) for name, rate in COPIED.items()}
        print("  there are:", ", ".join(f"{name} {count:.1f}" for name, count in there.items()))


if __name__ == "__main__":
    main()
