"""Adaptive sampling (vAttention, Desai et al. 2025): as large a sample as the accuracy needs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton.language as tl

from vllm_sparse_plugin.paged.triton_kernels.cache_rows import PARTS, DeviceBatch
from vllm_sparse_plugin.paged.triton_kernels.counter_random import layer_stream
from vllm_sparse_plugin.paged.triton_kernels.grids import launched
from vllm_sparse_plugin.paged.triton_kernels.lists import DeviceLists, list_tokens
from vllm_sparse_plugin.paged.triton_kernels.radix import BASE, GIVEN
from vllm_sparse_plugin.paged.triton_kernels.radix_workspace import RadixWorkspace
from vllm_sparse_plugin.paged.triton_kernels.random_order import BASE_FLAG
from vllm_sparse_plugin.paged.triton_kernels.sampling import draw
from vllm_sparse_plugin.paged.triton_kernels.selected_mass import DeviceMass, sum_selected_mass


@launched
def _budget_kernel(
    static_top,
    static_mass,
    base_top,
    base_mass,
    base_squares,
    base_terms,
    sizes,
    counts,
    probability,
    HEADS: tl.constexpr,
    EPSILON: tl.constexpr,
    QUANTILE: tl.constexpr,
    PARTS: tl.constexpr,
):
    """What a unit draws: the most that one of its query heads asks for, in float64.

    The formula of `AdaptiveSamplingMasker`.
    """
    unit = tl.program_id(0).to(tl.int64)
    size = tl.load(sizes + 2 * unit)
    unselected = tl.load(sizes + 2 * unit + 1)
    rest = unselected - size
    parts = tl.arange(0, PARTS)
    budget = tl.zeros([], tl.int32)
    if size > 0:
        for head in range(HEADS):
            at = (unit * HEADS + head) * PARTS + parts
            static, base = tl.load(static_top + at), tl.load(base_top + at)
            peak = tl.maximum(tl.max(static, 0), tl.max(base, 0))
            static_sum = tl.sum(tl.exp((static - peak).to(tl.float64)) * tl.load(static_mass + at))
            factor = tl.exp((base - peak).to(tl.float64))
            masses = factor * tl.load(base_mass + at)
            terms = tl.load(base_terms + at)
            number = size.to(tl.float64)
            mean = tl.sum(masses, 0) / number
            distance = masses / tl.maximum(terms, 1.0) - mean
            squares = factor * factor * tl.load(base_squares + at) + distance * distance * terms
            variance = tl.sum(squares, 0) / tl.maximum(number - 1, 1.0)
            # At least the term of 1 at the peak is in one of the two sums: above 0.
            denominator = static_sum + mean * unselected.to(tl.float64)
            tolerated = tl.full([], EPSILON, tl.float64) * denominator
            others = rest.to(tl.float64)
            asked = tl.full([], QUANTILE, tl.float64) * tl.sqrt(variance) * others / tolerated
            asked = asked * asked
            # Without replacement: the variance falls to 0 as the sample takes everything.
            asked = asked / (1 + asked / tl.maximum(others, 1.0))
            wanted = tl.minimum(tl.ceil(asked), others).to(tl.int32)
            budget = tl.maximum(budget, tl.minimum(tl.maximum(wanted, size), rest))
        share = budget.to(tl.float64) / tl.maximum(rest, 1).to(tl.float64)
        tl.store(probability + unit, share.to(tl.float32))
    tl.store(counts + unit, size + budget)


@dataclass(frozen=True)
class AdaptiveWorkspace:
    """What the steps of a draw tell each other.

    Attributes:
        selected: Lists of what was selected before; they belong to query heads where units do.
        base: Lists of the base samples.
        static: The mass of what was selected before.
        spread: The mass of the base samples, and its spread.
        order: `[max_queries * num_units, capacity]`, int32.
        sizes: `[max_queries * num_units, 2]`, int32: keys of each base sample, and keys that were
            unselected before.
        counts: `[max_queries * num_units]`, int32: keys drawn, with the base sample.
    """

    selected: DeviceLists
    base: DeviceLists
    static: DeviceMass
    spread: DeviceMass
    order: torch.Tensor
    sizes: torch.Tensor
    counts: torch.Tensor

    @classmethod
    def of(
        cls,
        max_queries: int,
        num_heads: int,
        num_kv_heads: int,
        num_units: int,
        capacity: int,
        device: torch.device | str,
        parts: int = PARTS,
    ) -> AdaptiveWorkspace:
        """Asks for the memory.

        Args:
            max_queries: Queries of a launch, at most.
            num_heads: Query heads.
            num_kv_heads: KV heads.
            num_units: Query heads or KV heads: who draws.
            capacity: Of the flags.
            device: Of the kernels.
            parts: Of a list, at most, a power of 2.
        """
        rows, units = max_queries * num_units, num_units // num_kv_heads

        def integers(*size: int) -> torch.Tensor:
            return torch.empty(size, dtype=torch.int32, device=device)

        return cls(
            DeviceLists.of(max_queries, num_kv_heads, units, capacity, False, device),
            DeviceLists.of(max_queries, num_kv_heads, units, capacity, False, device),
            DeviceMass.of(max_queries, num_heads, False, device, parts),
            DeviceMass.of(max_queries, num_heads, True, device, parts),
            integers(rows, capacity),
            integers(rows, 2),
            integers(rows),
        )


def sample_adaptively(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    batch: DeviceBatch,
    scaling: float,
    base_keys: int,
    base_share: float,
    epsilon: float,
    quantile: float,
    seed: int,
    layer: int,
    flags: torch.Tensor,
    probability: torch.Tensor,
    workspace: AdaptiveWorkspace,
    radix: RadixWorkspace,
) -> None:
    """Selects a base sample for each unit, and samples as many keys as its query heads ask for.

    It reads the keys that are selected and the base sample. The keys are those of the numba kernel,
    but where float32 powers' last bits decide on a budget's rounding.

    Args:
        query: `[num_queries, num_heads, head_size]`, a floating type, its heads side by side.
        kv_cache: See `cache_rows`.
        batch: Of the queries.
        scaling: Of the scores.
        base_keys: Of the base sample; 0 = by `base_share`.
        base_share: Of the unselected keys, at least 2 keys.
        epsilon: Tolerated relative error of the denominator.
        quantile: Of the normal distribution, for the probability of a larger one.
        seed: Of the numbers, in [0, 2**63).
        layer: Index of the attention layer.
        flags: `[num_queries * num_units, capacity]`, uint8, 0 and 1; written.
        probability: `[num_queries * num_units]`, float32; written where keys are sampled.
        workspace: For as many queries, and such units.
        radix: For rows that are split.

    Raises:
        ValueError: The workspace does not fit the queries.
    """
    num_queries, num_heads, _ = query.shape
    rows, lengths = len(flags), batch.lengths
    stream = layer_stream(seed, layer)
    if len(workspace.counts) < rows or workspace.order.shape[1] != flags.shape[1]:
        raise ValueError(
            f"a workspace of {tuple(workspace.order.shape)} does not fit flags of "
            f"{tuple(flags.shape)}"
        )
    has_weights = workspace.selected.log_weights.shape[1] > 0
    list_tokens(flags, lengths, workspace.selected, probability if has_weights else None)
    sum_selected_mass(query, kv_cache, batch, workspace.selected, scaling, workspace.static)
    draw(
        num_heads,
        lengths,
        flags,
        workspace.order,
        radix,
        stream=stream,
        mode=BASE,
        keys=base_keys,
        share=base_share,
        flag=BASE_FLAG,
        sizes=workspace.sizes,
    )
    list_tokens(flags, lengths, workspace.base, only=BASE_FLAG)
    sum_selected_mass(query, kv_cache, batch, workspace.base, scaling, workspace.spread)
    static, base = workspace.static, workspace.spread
    _budget_kernel[(rows,)](
        static.top,
        static.mass,
        base.top,
        base.mass,
        base.squares,
        base.terms,
        workspace.sizes,
        workspace.counts,
        probability,
        HEADS=num_heads * num_queries // rows,
        EPSILON=epsilon,
        QUANTILE=quantile,
        PARTS=static.top.shape[1],
    )
    draw(
        num_heads,
        lengths,
        flags,
        workspace.order,
        radix,
        stream=stream,
        mode=GIVEN,
        flag=2,
        counts=workspace.counts,
    )
