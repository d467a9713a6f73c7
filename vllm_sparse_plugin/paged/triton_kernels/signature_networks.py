"""Bit signatures of keys and queries (HashAttention), made by small networks.

A launch per layer. Sums go through their terms in the order of `kernels.hash_signatures`, four at a
time, so that a key's signature depends on nothing beside the key, and is the numba kernel's bit for
bit where that one's processor has fused products and sums, and the network has no curved
activation: those differ from torch's in their last bits, and so may the sign of an output that is
nearly 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from vllm_sparse_plugin.paged.triton_kernels.grids import launched
from vllm_sparse_plugin.paged.triton_kernels.tiles import block_bytes

_TOKENS, _OUTPUTS = 16, 32
"""Of a program's tile; a word has 32 bits."""

_ACTIVATIONS = ("", "relu", "silu", "gelu", "tanh")


@triton.jit
def _activate(values, ACTIVATION: tl.constexpr):
    if ACTIVATION == 1:
        return tl.maximum(values, 0.0)
    if ACTIVATION == 2:
        return tl.div_rn(values, 1.0 + tl.exp(-values))
    if ACTIVATION == 3:
        return 0.5 * values * (1.0 + tl.erf(values * 0.7071067811865476))
    if ACTIVATION == 4:
        small = tl.exp(-2.0 * tl.abs(values))
        size = tl.div_rn(1.0 - small, 1.0 + small)
        return tl.where(values < 0, -size, size)
    return values


@launched
def _apply_layer(
    inputs,
    slots,
    matrices,
    biases,
    outputs,
    num_tokens,
    scale,
    input_head_stride,
    input_token_stride,
    output_head_stride,
    output_token_stride,
    BY_INPUT: tl.constexpr,
    BY_NETWORK: tl.constexpr,
    WIDTH_IN: tl.constexpr,
    WIDTH_OUT: tl.constexpr,
    FROM_BLOCKS: tl.constexpr,
    INTO_BLOCKS: tl.constexpr,
    PACK: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    OFFSET: tl.constexpr,
    STRIDE: tl.constexpr,
    ROWS_PER_HEAD: tl.constexpr,
    WORDS: tl.constexpr,
    TOKENS: tl.constexpr,
    OUTPUTS: tl.constexpr,
):
    head, word = tl.program_id(1), tl.program_id(2)
    tokens = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    present = tokens < num_tokens
    if FROM_BLOCKS or INTO_BLOCKS:
        slot = tl.load(slots + tokens, mask=present, other=-1)
        present = slot >= 0
        slot = tl.maximum(slot, 0)
        block = slot // BLOCK_SIZE * BLOCK_BYTES
        place = slot % BLOCK_SIZE
    if FROM_BLOCKS:
        start = (inputs.to(tl.pointer_type(tl.uint8)) + block).to(inputs.dtype)
        start += (head // BY_INPUT * BLOCK_SIZE + place) * (2 * WIDTH_IN)
    else:
        start = inputs + head // BY_INPUT * input_head_stride + tokens * input_token_stride
    columns = word * OUTPUTS + tl.arange(0, OUTPUTS)
    inside = columns < WIDTH_OUT
    network = head // BY_NETWORK
    matrix = matrices + network * (WIDTH_IN * WIDTH_OUT) + columns
    sums = tl.zeros([TOKENS, OUTPUTS], tl.float32)
    whole: tl.constexpr = WIDTH_IN // 4 * 4
    for k in tl.range(0, whole, 4):
        products = tl.zeros([TOKENS, OUTPUTS], tl.float32)
        for i in tl.static_range(4):
            # The second one first: the numba kernel's compiler fuses the first product into it.
            step = k + ((1 - i) if i < 2 else i)
            own = tl.load(start + step, mask=present, other=0.0).to(tl.float32) * scale
            weights = tl.load(matrix + step * WIDTH_OUT, mask=inside, other=0.0)
            if i == 0:
                products = own[:, None] * weights[None, :]
            else:
                products = tl.fma(own[:, None], weights[None, :], products)
        sums += products
    for k in tl.range(whole, WIDTH_IN):
        own = tl.load(start + k, mask=present, other=0.0).to(tl.float32) * scale
        weights = tl.load(matrix + k * WIDTH_OUT, mask=inside, other=0.0)
        sums = tl.fma(own[:, None], weights[None, :], sums)
    sums += tl.load(biases + network * WIDTH_OUT + columns, mask=inside, other=0.0)[None, :]
    if PACK:
        bits = ((sums >= 0) & inside[None, :]).to(tl.uint32)
        shifts = tl.arange(0, OUTPUTS).to(tl.uint32)
        words = tl.sum(bits << shifts[None, :], axis=1).to(tl.int32, bitcast=True)
        if INTO_BLOCKS:
            record = outputs.to(tl.pointer_type(tl.uint8)) + block
            record += OFFSET + head // ROWS_PER_HEAD * STRIDE
            row = (head % ROWS_PER_HEAD * WORDS + word) * BLOCK_SIZE
            tl.store(record.to(tl.pointer_type(tl.int32)) + row + place, words, mask=present)
        else:
            target = outputs + head * output_head_stride + tokens * output_token_stride + word
            tl.store(target, words, mask=present)
    else:
        target = outputs + head * output_head_stride + tokens * output_token_stride
        tl.store(
            target[:, None] + columns[None, :],
            _activate(sums, ACTIVATION),
            mask=present[:, None] & inside[None, :],
        )


def _launch(
    inputs: torch.Tensor,
    outputs: torch.Tensor,
    matrices: torch.Tensor,
    biases: torch.Tensor,
    num_tokens: int,
    heads: tuple[int, int],
    *,
    slots: torch.Tensor | None,
    strides: tuple[int, int],
    target_strides: tuple[int, int],
    blocks: tuple[bool, bool],
    pack: bool,
    activation: str,
    scale: float = 1.0,
    place: tuple[int, int] = (0, 0),
    kv_heads: int = 1,
) -> None:
    """One layer; `heads` of its inputs and its outputs, `blocks`: of which both are in blocks."""
    cache = inputs if blocks[0] else outputs
    networks, width_in, width_out = matrices.shape
    tiles = -(-num_tokens // _TOKENS)
    words = -(-width_out // _OUTPUTS)
    in_blocks = any(blocks)
    _apply_layer[(tiles, heads[1], words)](
        inputs,
        inputs if slots is None else slots,
        matrices,
        biases,
        outputs,
        num_tokens,
        float(scale),
        *strides,
        *target_strides,
        BY_INPUT=heads[1] // heads[0],
        BY_NETWORK=heads[1] // networks,
        WIDTH_IN=width_in,
        WIDTH_OUT=width_out,
        FROM_BLOCKS=blocks[0],
        INTO_BLOCKS=blocks[1],
        PACK=pack,
        ACTIVATION=_ACTIVATIONS.index(activation),
        BLOCK_BYTES=block_bytes(cache) if in_blocks else 1,
        BLOCK_SIZE=cache.shape[2] if in_blocks else 1,
        OFFSET=place[0],
        STRIDE=place[1],
        ROWS_PER_HEAD=heads[1] // kv_heads,
        WORDS=words,
        TOKENS=_TOKENS,
        OUTPUTS=_OUTPUTS,
        enable_fp_fusion=False,
    )


def write_signatures(
    kv_cache: torch.Tensor,
    place: tuple[int, int],
    matrices: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    activation: str,
    slots: torch.Tensor,
    hidden: Sequence[torch.Tensor],
    scale: float = 1.0,
) -> None:
    """Makes and writes the signatures of new keys; bits are 1 for what is not negative.

    Source: HashAttention, arXiv:2412.14468.

    Args:
        kv_cache: See the package, with the new keys; so `place` and `slots`.
        place: Of the index, see `kernels.hash_signatures`.
        matrices: Of each linear layer `[networks, in, out]`, float32, contiguous; each KV head's
            networks side by side.
        biases: Of each layer `[networks, out]`, float32, contiguous.
        activation: Between the layers: relu, silu, gelu or tanh.
        slots: Of the new keys.
        hidden: Scratch of each layer but the last: `[networks, >= num_tokens, out]`, float32, the
            last axis contiguous.
        scale: Of the keys, see `CacheScales`.
    """
    _apply_networks(
        kv_cache,
        (kv_cache.shape[1], len(matrices[0])),
        kv_cache,
        slots.shape[0],
        matrices,
        biases,
        activation,
        hidden,
        slots,
        place,
        scale,
    )


def sign_queries(
    query: torch.Tensor,
    matrices: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    activation: str,
    hidden: Sequence[torch.Tensor],
    own: torch.Tensor,
) -> None:
    """Makes the signatures of queries.

    Args:
        query: `[num_queries, num_heads, head_size]`, of any float type; channels side by side.
        matrices: See `write_signatures`; networks are a divisor of the heads, each is used for as
            many neighbouring heads as needed.
        biases: See `write_signatures`; so `activation`.
        activation: Between the layers.
        hidden: Scratch of each layer but the last: `[num_heads, >= num_queries, out]`, float32.
        own: `[num_queries, num_heads, ceil(bits / 32)]`, int32, contiguous; written.
    """
    heads = query.shape[1]
    _apply_networks(
        query,
        (heads, heads),
        own,
        query.shape[0],
        matrices,
        biases,
        activation,
        hidden,
        None,
        (0, 0),
        1.0,
    )


def _apply_networks(
    inputs: torch.Tensor,
    heads: tuple[int, int],
    target: torch.Tensor,
    num_tokens: int,
    matrices: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    activation: str,
    hidden: Sequence[torch.Tensor],
    slots: torch.Tensor | None,
    place: tuple[int, int],
    scale: float,
) -> None:
    if num_tokens == 0:
        return
    in_blocks = slots is not None
    kv_heads = inputs.shape[1] if in_blocks else 1
    last = len(matrices) - 1
    source, strides = inputs, (0, 0) if in_blocks else (inputs.stride(1), inputs.stride(0))
    for layer, (matrix, bias) in enumerate(zip(matrices, biases, strict=True)):
        outputs = target if layer == last else hidden[layer]
        token_first = layer == last and not in_blocks
        target_strides = (outputs.stride(int(token_first)), outputs.stride(int(not token_first)))
        _launch(
            source,
            outputs,
            matrix,
            bias,
            num_tokens,
            heads,
            slots=slots,
            strides=strides,
            target_strides=target_strides,
            blocks=(in_blocks and layer == 0, in_blocks and layer == last),
            pack=layer == last,
            activation="" if layer == last else activation,
            scale=1.0 if layer else scale,
            place=place,
            kv_heads=kv_heads,
        )
        source, strides, heads = outputs, target_strides, (heads[1], heads[1])
