"""Single kernels against the bandwidth of a copy: gathers, index scans, selection, index updates.

    python -m benchmarks.gpu.kernel_bandwidth --output FOLDER [--quick]

Page gather and token gather are decode attention over lists: of runs of a page's tokens, and of
single tokens, chosen at random. Each kernel runs on as many caches as fit (at most four), one after
the other, so that launches follow each other as a model's layers do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks.gpu import byte_counts
from benchmarks.gpu.command import run_stage
from benchmarks.gpu.paged_data import Sequences, empty_cache, fill, random_heads
from benchmarks.gpu.timing import Stopwatch, Timing, copy_bandwidth, stopwatch
from vllm_sparse_plugin.paged.layout import BlockLayout, BlockShape
from vllm_sparse_plugin.paged.page_bounds import PageBounds
from vllm_sparse_plugin.paged.triton_kernels.attention import AttentionWorkspace, attend_lists
from vllm_sparse_plugin.paged.triton_kernels.flags import start_flags
from vllm_sparse_plugin.paged.triton_kernels.lists import DeviceLists, list_tokens
from vllm_sparse_plugin.paged.triton_kernels.page_bounds import update_pages
from vllm_sparse_plugin.paged.triton_kernels.page_lists import list_pages
from vllm_sparse_plugin.paged.triton_kernels.page_scores import score_pages
from vllm_sparse_plugin.paged.triton_kernels.pooling import PoolingWorkspace
from vllm_sparse_plugin.paged.triton_kernels.radix_workspace import RadixWorkspace
from vllm_sparse_plugin.paged.triton_kernels.selection import flag_largest
from vllm_sparse_plugin.paged.triton_kernels.writing import write_rows


@dataclass(frozen=True)
class Sizes:
    """What is measured.

    Attributes:
        batch: Sequences.
        keys: Of each.
        query_heads: Of the layer.
        kv_heads: Of the layer.
        head_size: Channels of a key.
        page_size: Keys of a page.
        block_size: Tokens of a block.
        dtype: Of the cache.
        densities: Of what is selected.
        bits: Of the pages' bounds.
        copied: Bytes of the copy that kernels are compared with.
    """

    batch: int = 8
    keys: int = 32768
    query_heads: int = 32
    kv_heads: int = 8
    head_size: int = 128
    page_size: int = 16
    block_size: int = 16
    dtype: torch.dtype = torch.bfloat16
    densities: tuple[float, ...] = (0.05, 0.1, 0.25)
    bits: tuple[int, ...] = (4, 16)
    copied: int = 1 << 30

    @property
    def shape(self) -> BlockShape:
        """Of the cache."""
        return BlockShape(
            self.block_size, self.query_heads, self.kv_heads, self.head_size, self.dtype
        )

    @property
    def heads(self) -> byte_counts.Heads:
        """For counting bytes."""
        return byte_counts.Heads(
            self.query_heads, self.kv_heads, self.head_size, self.dtype.itemsize
        )


TINY = Sizes(
    batch=2,
    keys=64,
    query_heads=4,
    kv_heads=2,
    head_size=16,
    dtype=torch.float32,
    densities=(0.25,),
    copied=1 << 16,
)
"""For dry runs."""


def random_lists(
    sizes: Sizes, density: float, run: int, device: torch.device | str
) -> tuple[torch.Tensor, torch.Tensor]:
    """A list per sequence and KV head: runs of tokens, each run at a multiple of its length.

    Args:
        sizes: Of the sequences.
        density: Share of the tokens.
        run: Tokens side by side.
        device: Of the result.

    Returns:
        Positions `[lists, keys]`, ascending, and counts `[lists]`.
    """
    places = sizes.keys // run
    chosen = max(1, round(density * places))
    lists = sizes.batch * sizes.kv_heads
    generator = torch.Generator(device).manual_seed(1)
    order = torch.rand(lists, places, generator=generator, device=device).argsort(dim=1)
    starts = order[:, :chosen].sort(dim=1).values * run
    tokens = (starts[:, :, None] + torch.arange(run, device=device)).flatten(1)
    held = torch.zeros(lists, sizes.keys, dtype=torch.int32, device=device)
    held[:, : tokens.shape[1]] = tokens.to(torch.int32)
    counts = torch.full((lists,), tokens.shape[1], dtype=torch.int32, device=device)
    return held, counts


class Bench:
    """Caches of one layout, and kernels on them."""

    def __init__(self, sizes: Sizes, bits: int, device: torch.device | str, watch: Stopwatch):
        """Fills the caches.

        Args:
            sizes: Of all.
            bits: Of the bounds that the caches hold.
            device: Of them.
            watch: Of the device.
        """
        self.sizes, self.watch = sizes, watch
        self.index = PageBounds(sizes.page_size, bits)
        self.layout = BlockLayout(sizes.shape, (self.index,))
        self.sequences = Sequences.of(sizes.batch, sizes.keys, sizes.block_size, device)
        generator = torch.Generator(device).manual_seed(2)
        shape = sizes.shape
        self.query = random_heads(sizes.batch, sizes.query_heads, shape, generator)
        self.new_keys = random_heads(sizes.batch, sizes.kv_heads, shape, generator)
        self.output = torch.empty_like(self.query)
        self.caches = []
        for seed in range(copies_that_fit(self.layout, self.sequences)):
            cache = empty_cache(self.layout, self.sequences)
            fill(partial(self.write, cache), shape, self.sequences, seed)
            self.caches.append(cache)

    def write(
        self, cache: torch.Tensor, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor
    ) -> None:
        """Keys, values, and the pages' bounds, in one launch as the engine writes them."""
        update_pages(
            cache,
            self.layout.place_of(self.index),
            self.index.record_bytes(self.sizes.shape),
            self.sizes.head_size,
            self.sizes.page_size,
            self.index.label_bits,
            slots,
            key,
            value,
        )

    def on_each_cache(self, launch: Callable[[torch.Tensor], object]) -> Timing:
        """Of one launch."""
        return self.watch.time([partial(launch, cache) for cache in self.caches])

    def gather(self, tokens: torch.Tensor, counts: torch.Tensor) -> Timing:
        """Attention over lists."""
        sizes, device = self.sizes, self.query.device
        space = AttentionWorkspace.of(
            sizes.batch, sizes.query_heads, sizes.kv_heads, sizes.head_size, device
        )
        nothing = torch.zeros(sizes.batch, dtype=torch.int32, device=device)
        return self.on_each_cache(
            lambda cache: attend_lists(
                self.query,
                cache,
                self.sequences.batch,
                tokens,
                None,
                counts,
                sizes.head_size**-0.5,
                self.output,
                space,
                nothing,
            )
        )

    def score(self, cache: torch.Tensor, scores: torch.Tensor) -> None:
        """Scores of all pages."""
        batch = self.sequences.batch
        score_pages(
            self.query,
            cache,
            self.layout.place_of(self.index),
            self.index.record_bytes(self.sizes.shape),
            self.sizes.page_size,
            self.index.label_bits,
            batch.block_table,
            batch.rows,
            batch.lengths,
            scores,
        )

    def selection(self, scores: torch.Tensor, by_head: bool, density: float) -> dict[str, Timing]:
        """From scores to lists of the tokens of the largest pages.

        Scores and flags are made anew each time, since selecting overwrites them.

        Args:
            scores: Of pages; overwritten.
            by_head: Whether each query head selects, not each KV head.
            density: Of each of them.
        """
        sizes, batch = self.sizes, self.sequences.batch
        device = self.query.device
        selectors = sizes.query_heads if by_head else sizes.kv_heads
        flags = torch.zeros(sizes.batch * selectors, sizes.keys, dtype=torch.uint8, device=device)
        pages = sizes.keys // sizes.page_size
        counts = torch.full_like(batch.lengths, max(1, round(density * pages)))
        radix = RadixWorkspace.of(device)
        pools = PoolingWorkspace.of(sizes.batch, sizes.query_heads, pages, device)
        units = selectors // sizes.kv_heads
        lists = DeviceLists.of(sizes.batch, sizes.kv_heads, units, sizes.keys, False, device)
        scaling = sizes.head_size**-0.5

        def select(cache: torch.Tensor) -> None:
            start_flags(flags, batch.lengths)
            self.score(cache, scores)
            flag_largest(
                scores,
                sizes.page_size,
                selectors,
                counts,
                scaling,
                batch.lengths,
                flags,
                radix,
                pools,
            )

        nothing = torch.empty(0, sizes.batch, dtype=torch.int32, device=device)
        reads = torch.zeros(sizes.batch, 3, dtype=torch.int64, device=device)

        def select_and_list(cache: torch.Tensor) -> None:
            self.score(cache, scores)
            args = (scores, sizes.page_size, sizes.kv_heads, counts, scaling, batch.lengths)
            list_pages(*args, nothing, None, lists, reads)

        found = {}
        if not by_head:
            found["score, select and list"] = self.on_each_cache(select_and_list)
        return found | {
            "start flags": self.watch.time([lambda: start_flags(flags, batch.lengths)]),
            "start, score and select": self.on_each_cache(select),
            "list tokens": self.watch.time([lambda: list_tokens(flags, batch.lengths, lists)]),
        }

    def index_update(self) -> dict[str, Timing]:
        """What a decode step writes to a layer, without and with its index.

        Of pages that have their last key, bounds are made; in a step in which no page has, none.
        """
        last, keys = self.sequences.last_slots, self.new_keys  # all sequences are of whole pages
        inside = last - 1
        return {
            "write": self.on_each_cache(lambda cache: write_rows(keys, keys, cache, inside)),
            "write and update": self.on_each_cache(
                lambda cache: self.write(cache, keys, keys, inside)
            ),
            "write and update, pages end": self.on_each_cache(
                lambda cache: self.write(cache, keys, keys, last)
            ),
        }


def copies_that_fit(layout: BlockLayout, sequences: Sequences, most: int = 4) -> int:
    """Caches that fit into half of the free memory, at least one."""
    device = sequences.batch.rows.device
    if device.type != "cuda":
        return 1
    free, _ = torch.cuda.mem_get_info(device)
    tokens = sequences.num_blocks * sequences.block_size
    size = tokens * layout.shape.num_kv_heads * layout.bytes_per_token
    return max(1, min(most, free // 2 // size))


def measure(sizes: Sizes, device: torch.device | str, watch: Stopwatch) -> dict[str, Any]:
    """Everything.

    Args:
        sizes: Of all.
        device: Of the kernels.
        watch: Of the device.
    """
    bandwidth = copy_bandwidth(device, watch, sizes.copied)
    records = []
    for bits in sizes.bits:
        bench = Bench(sizes, bits, device, watch)
        for record in _of_layout(bench, is_first=bits == sizes.bits[0]):
            if "bytes" in record:
                rate = record["bytes"] / (1e-6 * record["microseconds"])
                record["bandwidth"], record["share_of_copy"] = rate, rate / bandwidth
            records.append(record)
        del bench
    return {
        "device": str(device),
        "copy_bytes_per_second": bandwidth,
        "sizes": {name: str(value) for name, value in vars(sizes).items()},
        "records": records,
    }


def _of_layout(bench: Bench, is_first: bool) -> Iterator[dict[str, Any]]:
    """Records of one kind of bounds; what does not depend on them is measured once."""
    sizes, device = bench.sizes, bench.query.device
    pages = math.ceil(sizes.keys / sizes.page_size)
    scores = torch.zeros(sizes.batch, sizes.query_heads, pages, device=device)
    record_bytes = bench.index.record_bytes(sizes.shape)
    yield {
        "kernel": "index scan",
        "bits": bench.index.label_bits,
        "bytes": byte_counts.page_scan_bytes(
            sizes.heads, sizes.batch, sizes.keys, sizes.page_size, record_bytes
        ),
        **bench.on_each_cache(lambda cache: bench.score(cache, scores)).to_dict(),
    }
    for name, timing in bench.index_update().items():
        yield {"kernel": name, "bits": bench.index.label_bits, **timing.to_dict()}
    if not is_first:
        return
    for density in sizes.densities:
        for name, run in (("page gather", sizes.page_size), ("token gather", 1)):
            tokens, counts = random_lists(sizes, density, run, device)
            yield {
                "kernel": name,
                "density": density,
                "bytes": byte_counts.gather_bytes(sizes.heads, sizes.batch, int(counts.sum())),
                **bench.gather(tokens, counts).to_dict(),
            }
    for density in sizes.densities:
        for by_head in (False, True):
            for name, timing in bench.selection(scores, by_head, density).items():
                yield {
                    "kernel": name,
                    "per": "query head" if by_head else "KV head",
                    "density": density,
                    "bits": bench.index.label_bits,
                    **timing.to_dict(),
                }


@torch.inference_mode()
def stage(device: str, is_quick: bool, variant: str) -> dict[str, Any]:
    """The stage's result; see `command.run_stage`."""
    sizes = TINY if device == "cpu" else Sizes()
    return measure(sizes, device, stopwatch(device, 10 if is_quick else 50))


if __name__ == "__main__":
    run_stage("bandwidth", __doc__ or "", stage)
