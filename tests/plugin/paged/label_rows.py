"""For tests of indices that hold something about each key."""

from dataclasses import replace

import numba
import numpy as np
import torch

from sparse_attention_hub.sparse_attention.research_attention.maskers.base import (
    MaskerConfig,
    ResearchMasker,
)
from sparse_attention_hub.sparse_attention.research_attention.maskers.fixed import TopKMasker
from tests.plugin.paged.paged_rows import (
    Rows,
    attend,
    general,
    make_rows,
    model_dtype,
    paged_attention,
    shape_of,
)
from tests.tolerances import ATTENTION_ATOL
from vllm_sparse_plugin.paged.attention import PagedAttention
from vllm_sparse_plugin.paged.cache_scales import UNSCALED, CacheScales
from vllm_sparse_plugin.paged.layout import BlockLayout, LayerCache
from vllm_sparse_plugin.paged.maskers.base import PagedQueries
from vllm_sparse_plugin.paged.prefill import stored_rows


def slots_of(rows: Rows, row: int) -> torch.Tensor:
    """Where a row's keys are."""
    size = rows.cache.layout.shape.block_size
    place = torch.arange(rows.keys[row].shape[2])
    return torch.from_numpy(rows.batch.block_table[row])[place // size].long() * size + place % size


def at_slots(stored: torch.Tensor, slots: torch.Tensor, block_size: int) -> torch.Tensor:
    """What is stored for some keys: `[blocks, KV heads, rows, block_size, ...]` to
    `[keys, KV heads, rows, ...]`."""
    return stored[slots // block_size, :, :, slots % block_size]


def rebuilt(rows: Rows) -> LayerCache:
    """The same cache, with every row written again from its cached keys, at once."""
    old = rows.cache
    kv_cache = torch.full_like(rows.kv_cache, torch.nan)
    cache = LayerCache.of(kv_cache, old.layout, old.layer_index, old.scales)
    shape = old.layout.shape
    every = torch.arange(len(rows.kv_cache), dtype=torch.int32)
    count = len(every) * shape.block_size
    keys, values = stored_rows(old, every, count, 0, shape.num_kv_heads, model_dtype(shape))
    for row in range(len(rows.keys)):
        slots = slots_of(rows, row)
        cache.write(keys[slots], values[slots], slots)
    return cache


def assert_same_keys(
    maskers: list[dict],
    exact: bool = True,
    near_ties: int = 0,
    scales: CacheScales = UNSCALED,
    **shape,
) -> None:
    """The fast path selects what the general path does, up to `near_ties` rows."""
    attention, layout = paged_attention(maskers, shape_of(**shape))
    different = 0
    for spare_keys in (0, 5):
        rows = make_rows(layout, exact=exact, layer_index=1, spare_keys=spare_keys, scales=scales)
        output, read = attend(attention, rows)
        expected, counts = general(maskers, rows)
        assert read.keys.tolist() == counts
        atol = ATTENTION_ATOL[model_dtype(layout.shape)]
        far = (output - expected).abs().amax(dim=(1, 2)) > atol
        different += int(far.sum())
    assert different <= near_ties


def assert_same_scores(config: MaskerConfig, **shape) -> None:
    """Scores of random keys, by query head, are the reference masker's but for their last bits."""
    attention = PagedAttention([config], shape_of(**shape))
    [masker] = attention.maskers
    rows = make_rows(BlockLayout(attention.shape, masker.indices), exact=False, layer_index=1)
    queries = PagedQueries(
        query=rows.query.float().numpy(),
        cache=rows.cache,
        block_table=rows.batch.block_table,
        rows=rows.batch.rows,
        lengths=rows.batch.lengths,
        scaling=1.0,
        flags=np.zeros((rows.query.shape[0] * rows.query.shape[1], 304), np.uint8),
        probability=np.zeros(0, np.float32),
        scores=np.zeros((*rows.query.shape[:2], 304), np.float32),
        keys_scored=np.zeros(len(rows.query), np.int64),
    )
    masker.select(queries)
    reference = ResearchMasker.create_masker_from_config(config)
    assert isinstance(reference, TopKMasker)
    for row, keys in enumerate(rows.keys):
        query = rows.query[row][None, :, None]
        expected = reference.scores(query, keys, rows.values[row], None, {}, 1)[0, :, 0]
        found = torch.from_numpy(queries.scores[row, :, : keys.shape[2]])
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def assert_independent_rows(maskers: list[dict]) -> None:
    """Bit for bit, a query gets alone what it gets in a batch."""
    attention, layout = paged_attention(maskers, shape_of())
    rows = make_rows(layout, exact=False)
    output, read = attend(attention, rows)
    for row, result in enumerate(output):
        own = slice(row, row + 1)
        batch = replace(rows.batch, rows=rows.batch.rows[own], lengths=rows.batch.lengths[own])
        alone, counts = attend(attention, replace(rows, query=rows.query[own], batch=batch))
        assert torch.equal(alone[0], result)
        assert counts.keys[0] == read.keys[row]


def assert_same_with_threads(maskers: list[dict]) -> None:
    """Bit for bit, with one thread and with all: of what blocks hold, and of what is read."""
    attention, layout = paged_attention(maskers, shape_of())
    before = numba.get_num_threads()
    outputs = []
    for threads in (1, numba.config.NUMBA_NUM_THREADS):
        numba.set_num_threads(threads)
        outputs.append(attend(attention, make_rows(layout, exact=False))[0])
    numba.set_num_threads(before)
    assert torch.equal(*outputs)
