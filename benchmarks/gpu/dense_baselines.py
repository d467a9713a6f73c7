"""One dense decode step of a layer by what vLLM itself has: FlashAttention, FlashInfer, Triton.

On a cache of vLLM's own form: a token's key and value side by side, of one head after the other,
in blocks in any order. A kernel that is not installed, or fails, is left out, and the result says
why. What is planned once per step for all layers is not in the time.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from benchmarks.gpu.paged_data import Sequences, random_heads
from benchmarks.gpu.timing import Stopwatch, Timing
from vllm_sparse_plugin.paged.layout import BlockShape

logger = logging.getLogger(__name__)

Attend = Callable[[torch.Tensor, torch.Tensor], None]
"""Takes a cache and where the output goes."""
PLAIN = "plain torch"
"""The kernel of dry runs."""
_RELATIVE_ERROR = 0.02
"""Of an output in bfloat16: its norm's, against float32."""
_TRITON_SEGMENTS = 16
_TRITON_GRID = 128
"""As vLLM's Triton backend has them."""
_WORKSPACE_BYTES = 256 << 20


@dataclass(frozen=True)
class DenseCase:
    """What all kernels compute.

    Attributes:
        shape: Of the layer.
        sequences: Of the batch.
        query: `[count, num_heads, head_size]`.
    """

    shape: BlockShape
    sequences: Sequences
    query: torch.Tensor

    @classmethod
    def of(cls, shape: BlockShape, count: int, keys: int, device: torch.device | str) -> DenseCase:
        """With random queries."""
        generator = torch.Generator(device).manual_seed(3)
        query = random_heads(count, shape.num_heads, shape, generator)
        return cls(shape, Sequences.of(count, keys, shape.block_size, device), query)

    @property
    def scaling(self) -> float:
        """Of the scores."""
        return float(self.shape.head_size**-0.5)

    @property
    def bytes_per_cache(self) -> int:
        """Of one layer."""
        tokens = self.sequences.num_blocks * self.shape.block_size
        return tokens * self.shape.num_kv_heads * self.shape.key_value_bytes

    def cache(self, seed: int) -> torch.Tensor:
        """`[num_blocks, block_size, num_kv_heads, 2 * head_size]`, random, made in place."""
        shape = self.shape
        device = self.query.device
        cache = torch.empty(
            self.sequences.num_blocks,
            shape.block_size,
            shape.num_kv_heads,
            2 * shape.head_size,
            dtype=shape.dtype,
            device=device,
        )
        return cache.normal_(generator=torch.Generator(device).manual_seed(seed))

    def starts(self) -> torch.Tensor:
        """`[count + 1]`, int32: where each sequence's query begins."""
        device = self.query.device
        return torch.arange(self.sequences.count + 1, dtype=torch.int32, device=device)

    def reference(self, cache: torch.Tensor) -> torch.Tensor:
        """In float32, one sequence after the other."""
        table, rows = self.sequences.batch.block_table.long(), []
        group = self.shape.num_heads // self.shape.num_kv_heads
        for row in range(self.sequences.count):
            tokens = cache[table[row]].flatten(0, 1)[: self.sequences.keys].float()
            key, value = keys_and_values(tokens.transpose(0, 1))
            query = self.query[row].float().view(self.shape.num_kv_heads, group, -1)
            weights = (query @ key.transpose(1, 2) * self.scaling).softmax(-1)
            rows.append((weights @ value).flatten(0, 1))
        return torch.stack(rows)


def keys_and_values(cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The two halves of a cache's rows, as views."""
    size = cache.shape[-1] // 2
    return cache[..., :size], cache[..., size:]


def flash_attention(case: DenseCase) -> Attend:
    """FlashAttention as vLLM has it, version 3 where the GPU has it, else 2."""
    from vllm.vllm_flash_attn import flash_attn_interface as flash

    version = 3 if flash.is_fa_version_supported(3) else 2
    if version == 2 and not flash.is_fa_version_supported(2):
        raise RuntimeError(str(flash.fa_version_unsupported_reason(2)))
    shape, batch = case.shape, case.sequences.batch
    starts, keys = case.starts(), case.sequences.keys
    schedule = None
    if version == 3:
        schedule = flash.get_scheduler_metadata(
            batch_size=case.sequences.count,
            max_seqlen_q=1,
            max_seqlen_k=keys,
            num_heads_q=shape.num_heads,
            num_heads_kv=shape.num_kv_heads,
            headdim=shape.head_size,
            cache_seqlens=batch.lengths,
            qkv_dtype=shape.dtype,
            cu_seqlens_q=starts,
            page_size=shape.block_size,
            causal=True,
        )

    def attend(cache: torch.Tensor, output: torch.Tensor) -> None:
        key, value = keys_and_values(cache)
        flash.flash_attn_varlen_func(
            q=case.query,
            k=key,
            v=value,
            out=output,
            cu_seqlens_q=starts,
            max_seqlen_q=1,
            seqused_k=batch.lengths,
            max_seqlen_k=keys,
            softmax_scale=case.scaling,
            causal=True,
            block_table=batch.block_table,
            scheduler_metadata=schedule,
            fa_version=version,
        )

    return attend


def triton_attention(case: DenseCase) -> Attend:
    """Triton attention as vLLM has it, with the memory that lets it split long sequences."""
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention

    shape, batch = case.shape, case.sequences.batch
    starts, keys = case.starts(), case.sequences.keys
    most = max(case.sequences.count, _TRITON_GRID // shape.num_kv_heads)
    parts = (most, shape.num_heads, _TRITON_SEGMENTS)

    def space(*size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.float32, device=case.query.device)

    split = {
        "seq_threshold_3D": _TRITON_GRID // shape.num_kv_heads,
        "num_par_softmax_segments": _TRITON_SEGMENTS,
        "softmax_segm_output": space(*parts, shape.head_size),
        "softmax_segm_max": space(*parts),
        "softmax_segm_expsum": space(*parts),
    }

    def attend(cache: torch.Tensor, output: torch.Tensor) -> None:
        key, value = keys_and_values(cache)
        unified_attention(
            q=case.query,
            k=key,
            v=value,
            out=output,
            cu_seqlens_q=starts,
            max_seqlen_q=1,
            seqused_k=batch.lengths,
            max_seqlen_k=keys,
            softmax_scale=case.scaling,
            causal=True,
            window_size=(-1, -1),
            block_table=batch.block_table,
            softcap=0.0,
            q_descale=None,
            k_descale=None,
            v_descale=None,
            **split,
        )

    return attend


def flash_infer(case: DenseCase) -> Attend:
    """FlashInfer's decode on tensor cores, planned once; it compiles at its first use."""
    import flashinfer

    shape, sequences = case.shape, case.sequences
    blocks = sequences.batch.block_table.shape[1]
    space = torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=case.query.device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(space, "NHD", use_tensor_cores=True)
    last = (sequences.keys - 1) % shape.block_size + 1
    wrapper.plan(
        torch.arange(0, sequences.num_blocks + 1, blocks, dtype=torch.int32),
        sequences.batch.block_table.flatten(),
        torch.full((sequences.count,), last, dtype=torch.int32),
        shape.num_heads,
        shape.num_kv_heads,
        shape.head_size,
        shape.block_size,
        q_data_type=shape.dtype,
        kv_data_type=shape.dtype,
        sm_scale=case.scaling,
    )

    def attend(cache: torch.Tensor, output: torch.Tensor) -> None:
        wrapper.run(case.query, keys_and_values(cache), out=output)

    return attend


def plain_attention(case: DenseCase) -> Attend:
    """In steps of torch: for dry runs without a GPU, where the others are not."""

    def attend(cache: torch.Tensor, output: torch.Tensor) -> None:
        output.copy_(case.reference(cache))

    return attend


KERNELS: dict[str, Callable[[DenseCase], Attend]] = {
    "FLASH_ATTN": flash_attention,
    "FLASHINFER": flash_infer,
    "TRITON_ATTN": triton_attention,
}
"""By the names of vLLM's backends."""


@dataclass(frozen=True)
class DenseTimes:
    """Of a case.

    Attributes:
        times: By kernel.
        left_out: Why, by kernel.
    """

    times: dict[str, Timing]
    left_out: dict[str, str]

    @property
    def fastest(self) -> str:
        """The kernel with the smallest median.

        Raises:
            RuntimeError: None ran.
        """
        if not self.times:
            raise RuntimeError(f"no dense kernel ran: {self.left_out}")
        return min(self.times, key=lambda name: self.times[name].microseconds)


def measure_dense(
    case: DenseCase, watch: Stopwatch, layers: int = 1, names: tuple[str, ...] | None = None
) -> DenseTimes:
    """Times of the kernels that are there and right.

    Args:
        case: What they compute.
        watch: Of the device.
        layers: Caches that are read one after the other.
        names: Of the kernels; None: all, or in a dry run the plain one.
    """
    is_dry = case.query.device.type == "cpu"
    kernels = {PLAIN: plain_attention} if is_dry else KERNELS
    caches = [case.cache(seed) for seed in range(layers)]
    expected = case.reference(caches[0])
    times, left_out = {}, {}
    for name in names or kernels:
        try:
            attend = kernels[name](case)
            output = torch.full_like(case.query, math.nan)
            attend(caches[0], output)
            off = float((output.float() - expected).norm() / expected.norm())
            if not off < _RELATIVE_ERROR:  # NaN neither
                raise RuntimeError(f"its output is off by {off:.3f}")
            times[name] = watch.time([partial(attend, cache, output) for cache in caches])
        except Exception as error:  # whatever a library of its own brings along
            logger.warning("%s is left out: %s", name, error)
            left_out[name] = f"{type(error).__name__}: {error}"[:300]
    return DenseTimes(times, left_out)
