"""Bit signatures: those that the numba kernels write, and their scores, which are whole numbers."""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from sparse_attention_hub.sparse_attention.utils.hashattention_utils import save_hat_weights
from tests.plugin.paged.paged_rows import Rows, make_rows, shape_of
from tests.plugin.triton.interpreter import DEVICE
from tests.plugin.triton.paged_caches import (
    Batch,
    assert_same_bytes,
    edge_lengths,
    empty_scores,
    written_again,
)
from vllm_sparse_plugin.paged.hash_signatures import HashSignatures, stored_signatures
from vllm_sparse_plugin.paged.kernels import hash_signatures as numba_kernels
from vllm_sparse_plugin.paged.layout import BlockLayout, BlockShape
from vllm_sparse_plugin.paged.triton_kernels import tiles
from vllm_sparse_plugin.paged.triton_kernels.signature_networks import (
    sign_queries,
    write_signatures,
)
from vllm_sparse_plugin.paged.triton_kernels.signature_scores import score_signatures

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@dataclass(frozen=True)
class Case:
    """Networks of keys per KV head, and the widths that networks give, the last one in bits."""

    sizes: tuple
    rows_per_head: int
    widths: tuple[int, ...]
    activation: str = "relu"

    @property
    def shape(self) -> BlockShape:
        return shape_of(*self.sizes)


CASES = [
    Case((1, 1, 32, 16, F32), 1, (32,)),
    Case((4, 2, 64, 16, BF16), 2, (10, 33)),
    Case((6, 2, 80, 32, F16), 1, (7, 64)),
    Case((8, 2, 32, 16, BF16), 4, (6, 5, 40)),
    Case((7, 1, 64, 32, F16), 1, (31,)),
    Case((8, 1, 32, 128, F32), 1, (64,)),
    Case((2, 1, 128, 48, BF16), 1, (12, 32)),
]


class Weights:
    """A file of networks, and the same on the device."""

    def __init__(self, folder: Path, case: Case, exact: bool) -> None:
        generator = torch.Generator().manual_seed(3)

        def numbers(*size: int) -> torch.Tensor:
            if exact:
                return torch.randint(-1, 2, size, generator=generator).float()
            return torch.randn(size, generator=generator)

        shape = case.shape
        networks = {"key": shape.num_kv_heads * case.rows_per_head, "query": shape.num_heads}
        if case.rows_per_head == 1:
            networks["query"] = shape.num_kv_heads  # each for all query heads of a group
        self.parts: dict[str, list[torch.Tensor]] = {}
        for side, count in networks.items():
            widths = (shape.head_size, *case.widths)
            pairs = list(itertools.pairwise(widths))
            self.parts[f"{side}_matrix"] = [numbers(count, *pair) for pair in pairs]
            self.parts[f"{side}_bias"] = [numbers(count, pair[1]) for pair in pairs]
        path = folder / "weights.safetensors"
        save_hat_weights({0: self.parts}, path)
        self.index = HashSignatures(str(path), case.widths[-1], case.activation)

    def networks(self, side: str) -> tuple[list[torch.Tensor], list[torch.Tensor], str]:
        matrices, biases = (
            [tensor.to(DEVICE) for tensor in self.parts[f"{side}_{kind}"]]
            for kind in ("matrix", "bias")
        )
        return matrices, biases, self.index.activation


def hidden_of(matrices: Sequence[torch.Tensor], heads: int, tokens: int) -> list[torch.Tensor]:
    return [
        torch.full((heads, tokens, matrix.shape[2]), torch.nan, device=DEVICE)
        for matrix in matrices[:-1]
    ]


def update(
    weights: Weights, layout: BlockLayout, kv_cache: torch.Tensor, slots: torch.Tensor
) -> None:
    matrices, biases, activation = weights.networks("key")
    hidden = hidden_of(matrices, len(matrices[0]), len(slots) + 1)
    place = layout.place_of(weights.index)
    write_signatures(kv_cache, place, matrices, biases, activation, slots, hidden)


def query_signatures(rows: Rows, weights: Weights) -> tuple[torch.Tensor, np.ndarray]:
    """Of Triton and of numba, `[num_queries, num_heads, words]`."""
    heads = rows.query.shape[1]
    by_head = np.ascontiguousarray(rows.query.float().numpy().transpose(1, 0, 2))
    expected = weights.index.signatures(by_head, 0, "query", heads).transpose(1, 0, 2)
    found = torch.zeros(expected.shape, dtype=torch.int32, device=DEVICE)
    networks = weights.networks("query")
    hidden = hidden_of(networks[0], heads, len(rows.query))
    sign_queries(rows.query.to(DEVICE), *networks, hidden, found)
    return found, np.ascontiguousarray(expected)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_bytes_and_scores(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "PROGRAMS", 3)  # some rows have more tiles than programs
    monkeypatch.setattr(tiles, "TILE_NUMBERS", 256)
    # Small integers, of which many outputs are exactly 0, in whatever order they are summed.
    weights = Weights(tmp_path, case, exact=True)
    shape, index = case.shape, weights.index
    layout = BlockLayout(shape, (index,))
    rows = make_rows(layout, edge_lengths(shape.block_size), spare_keys=2)
    kv_cache = written_again(rows, functools.partial(update, weights, layout))
    assert_same_bytes(rows, kv_cache)
    own, expected_own = query_signatures(rows, weights)
    assert np.array_equal(own.cpu().numpy().view(np.uint32), expected_own)
    batch, on_device = rows.batch, Batch.of(rows)
    expected, found = empty_scores(rows).cpu().numpy(), empty_scores(rows)
    place, per_head = layout.place_of(index), case.rows_per_head
    numba_kernels.score_signatures(
        expected_own,
        index.bits,
        rows.cache.records,
        place,
        per_head,
        shape.block_size,
        batch.block_table,
        batch.rows,
        batch.lengths,
        expected,
    )
    table, lengths = on_device.block_table, on_device.lengths
    score_signatures(
        own, index.bits, kv_cache, place, per_head, table, on_device.rows, lengths, found
    )
    assert np.array_equal(found.cpu().numpy(), expected)


@pytest.mark.parametrize("activation", ["relu", "silu", "gelu", "tanh"])
def test_signs_of_random_networks(tmp_path: Path, activation: str) -> None:
    """Bit for bit but for outputs that are nearly 0, by any activation."""
    case = Case((4, 2, 64, 32, BF16), 2, (24, 64), activation)
    weights = Weights(tmp_path, case, exact=False)
    layout = BlockLayout(case.shape, (weights.index,))
    rows = make_rows(layout, (50,), exact=False)
    kv_cache = written_again(rows, functools.partial(update, weights, layout))
    words = [
        stored_signatures(weights.index, cache).numpy()
        for cache in (rows.cache, type(rows.cache).of(kv_cache.cpu(), layout, 0))
    ]
    block, place = rows.batch.block_table[0, np.arange(50) // 32], np.arange(50) % 32
    found, expected = (
        (w[block, :, :, place, :, None] >> np.arange(32) & 1).reshape(50, 4, 64) for w in words
    )
    outputs = rows.keys[0][0].double().repeat_interleave(2, dim=0)  # of the four networks
    functions = {"relu": torch.relu, "tanh": torch.tanh}
    functions |= {"silu": torch.nn.functional.silu, "gelu": torch.nn.functional.gelu}
    first, second = (m.double() for m in weights.parts["key_matrix"])
    bias, last_bias = (b.double()[:, None] for b in weights.parts["key_bias"])
    hidden = functions[activation](outputs @ first + bias)
    exact = (hidden @ second + last_bias).transpose(0, 1).numpy()
    # A hidden number is off by 65 roundings of 64 products, or 2e-4; an output of 24 of them, of
    # weights of order 1, by less than this, in whatever order and with whatever activation.
    sure = np.abs(exact) > 1e-2
    assert sure.mean() > 0.99
    assert np.array_equal(found[sure], (exact >= 0)[sure])
    assert np.array_equal(found[sure], expected[sure])
    if activation == "relu":  # the same sums, in the same order
        assert np.array_equal(found, expected)
