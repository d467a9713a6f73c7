"""MagicPIG's signatures: the bytes that the numba kernels store, samples and probabilities."""

import numpy as np
import pytest
import torch

from tests.plugin.paged.paged_rows import make_rows, shape_of
from tests.plugin.triton.interpreter import DEVICE
from tests.plugin.triton.paged_caches import Batch, assert_same_bytes
from tests.plugin.triton.row_order import for_device
from vllm_sparse_plugin.paged.bucket_signatures import BucketSignatures
from vllm_sparse_plugin.paged.kernels import bucket_signatures as numba_kernels
from vllm_sparse_plugin.paged.layout import BlockLayout
from vllm_sparse_plugin.paged.triton_kernels import (
    bucket_collisions,
    bucket_signatures,
    bucket_weights,
    tiles,
)
from vllm_sparse_plugin.paged.triton_kernels.cache_rows import DeviceBatch

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# Heads, KV heads, head size, block size, type; tables, bits of a table, whether keys are centred.
CASES = [
    ((4, 2, 32, 16, F32), 9, 3, True),
    ((6, 2, 40, 48, BF16), 5, 10, False),
    ((3, 1, 24, 32, F16), 3, 17, True),
    ((2, 2, 16, 16, F32), 2, 62, True),
    ((5, 1, 32, 128, BF16), 4, 1, True),
]
TAG = 11


@pytest.mark.parametrize(("sizes", "tables", "bits", "center"), CASES, ids=str)
def test_signatures_samples_and_probabilities(
    sizes: tuple, tables: int, bits: int, center: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "PROGRAMS", 3)  # some rows have more tiles than programs
    monkeypatch.setattr(bucket_signatures, "TILE_NUMBERS", 256)  # tables in several programs
    index = BucketSignatures(tables, bits, center, seed=3)
    shape = shape_of(*sizes)
    layout = BlockLayout(shape, (index,))
    # Small integers, whose means are not: sums differ from other orders', and hardly ever in sign.
    rows = make_rows(layout, (1, shape.block_size + 1, 5))
    cache, batch, place = rows.cache, rows.batch, layout.place_of(index)
    kv_cache = for_device(rows.kv_cache, shape)
    keys = [key[0].float().transpose(0, 1) for key in rows.keys]
    means = torch.stack([key.mean(0) * center for key in keys]).flatten(1)
    projections = index.projections(0, shape)
    number, size = len(keys), shape.block_size
    own = np.empty((number, shape.num_heads, tables), index.unsigned)
    query = rows.query.float()
    numba_kernels.sign_queries(query.numpy(), projections, bits, own)
    lists = [
        (batch.block_table[row, block], min(size, len(key) - block * size), row)
        for row, key in enumerate(keys)
        for block in range(-(-len(key) // size))
    ]
    blocks, wanted, owners = (np.array(column, np.int64) for column in zip(*lists, strict=True))
    numba_kernels.sign_keys(
        cache.elements,
        shape.kind,
        cache.records,
        place,
        index.header_words(shape),
        index.codes_at(shape),
        size,
        projections,
        bits,
        index.unsigned.itemsize,
        blocks,
        wanted,
        owners + TAG,
        owners,
        means.numpy(),
    )
    on_device = Batch.of(rows)
    lengths = on_device.lengths
    device_batch = DeviceBatch(
        on_device.block_table,
        on_device.rows,
        lengths,
        torch.arange(number, dtype=torch.int32, device=DEVICE),
    )
    tags = torch.arange(number, device=DEVICE) + TAG
    held = torch.from_numpy(projections).to(DEVICE)
    arguments = (place, index.codes_at(shape), index.unsigned.itemsize, bits, held)
    states = means.to(DEVICE)
    for row, key in enumerate(keys):
        one = device_batch.part(slice(row, row + 1))
        if len(key) > 1:  # all but the last one, and then that
            few = DeviceBatch(one.block_table, one.rows, one.lengths - 1, one.places)
            count = -(-(len(key) - 1) // size)
            bucket_signatures.sign_keys(
                kv_cache, *arguments, few, tags, states, center, num_blocks=count
            )
    bucket_signatures.sign_keys(kv_cache, *arguments, device_batch, tags, states, center)
    assert_same_bytes(rows, kv_cache)
    signatures = torch.empty(own.shape, dtype=torch.int64, device=DEVICE)
    bucket_signatures.sign_queries(rows.query.to(DEVICE), held, bits, signatures)
    assert signatures.cpu().tolist() == own.astype(np.int64).tolist()

    capacity = int(batch.lengths.max()) + 3
    units = number * shape.num_heads
    flags = np.zeros((units, capacity), np.uint8)
    flags[:, :2] = 1  # selected already
    found = torch.from_numpy(flags.copy()).to(DEVICE)
    queries = np.arange(number)
    signs = layout.place_of(index, index.codes_at(shape))
    rest = (batch.block_table, batch.rows, batch.lengths)
    numba_kernels.flag_collisions(own, cache.records, signs, size, *rest, queries, flags)
    # The codes of the last row are another one's, for the device: it makes them from the keys.
    tags[-1] = TAG - 1
    bucket_collisions.flag_collisions(
        signatures, kv_cache, *arguments, device_batch, tags, states, center, found
    )
    assert torch.equal(found.cpu(), torch.from_numpy(flags))
    chances = np.full((units, capacity), -1, np.float32)
    scored = np.zeros((number, shape.num_kv_heads, -(-capacity // size)), np.int32)
    numba_kernels.weigh_collisions(
        query.numpy(),
        cache.elements,
        shape.kind,
        size,
        *rest,
        queries,
        tables,
        bits,
        queries,
        means.numpy(),
        flags,
        chances,
        scored,
    )
    probability = torch.full((units, capacity), -1.0, device=DEVICE)
    reads = torch.zeros(number, 3, dtype=torch.int64, device=DEVICE)
    bucket_weights.weigh_collisions(
        rows.query.to(DEVICE),
        kv_cache,
        device_batch,
        tables,
        bits,
        states,
        found,
        probability,
        reads,
    )
    assert reads[:, 2].tolist() == scored.sum(axis=(1, 2)).tolist()
    assert reads[:, :2].sum() == 0
    expected = torch.from_numpy(chances)
    assert torch.equal(probability.cpu() < 0, expected < 0)
    # float32 cosines differ by some of their last bits; a bucket of K bits has the K-th power of
    # what follows from one, and two collisions its square.
    torch.testing.assert_close(probability.cpu(), expected, rtol=2e-6 * (bits + 4), atol=1e-12)
    assert (flags == 3).any() == (bits < 10)


def test_arc_cosines_and_probabilities_over_all_angles() -> None:
    """Against float64, through a cache whose keys are unit vectors at chosen angles."""
    shape = shape_of(1, 1, 16, 16)
    layout = BlockLayout(shape, (BucketSignatures(7, 3, False, 0),))
    rows = make_rows(layout, (16,))
    block = int(rows.batch.block_table[0, 0])
    angles = torch.linspace(0, torch.pi, 16, dtype=torch.float64)
    kv_cache = for_device(rows.kv_cache, shape)
    keys = kv_cache[block].view(-1)[: 16 * 32].view(16, 32)
    keys[:, :16] = 0
    keys[:, 0], keys[:, 1] = angles.cos().float().to(DEVICE), angles.sin().float().to(DEVICE)
    query = torch.zeros(1, 1, 16, device=DEVICE)
    query[..., 0] = 3.0
    batch = Batch.of(rows)
    zeros = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    probability = torch.zeros(1, 16, device=DEVICE)
    bucket_weights.weigh_collisions(
        query,
        kv_cache,
        DeviceBatch(batch.block_table, batch.rows, batch.lengths, zeros),
        7,
        3,
        torch.zeros(1, 16, device=DEVICE),
        torch.full((1, 16), 3, dtype=torch.uint8, device=DEVICE),
        probability,
        torch.zeros(1, 3, dtype=torch.int64, device=DEVICE),
    )
    hit = (1 - angles / torch.pi) ** 3
    expected = (1 - (1 - hit) ** 7 - 7 * hit * (1 - hit) ** 6).clamp(1e-12, 1)
    found = probability[0].cpu().double()
    # Angles of float32 vectors are known to 1e-7 but at both ends, where a cosine hardly changes.
    torch.testing.assert_close(found[1:-1], expected[1:-1], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-6)
