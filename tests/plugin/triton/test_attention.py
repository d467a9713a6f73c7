"""Split decode attention over lists of tokens, against float64."""

import numpy as np
import pytest
import torch

from tests.plugin.paged.paged_rows import shape_of
from tests.plugin.triton.device_rows import DeviceRows, device_rows, permuted
from tests.plugin.triton.interpreter import DEVICE
from tests.tolerances import ATTENTION_ATOL
from vllm_sparse_plugin.paged.triton_kernels.attention import AttentionWorkspace, attend_lists
from vllm_sparse_plugin.paged.triton_kernels.cache_rows import DeviceBatch
from vllm_sparse_plugin.paged.triton_kernels.lists import NOT_SELECTED

# float32 caches: sums of float32 products. Others: a term's weight is rounded once to the cache's
# type, as an output in that type would be; the output is compared before it is rounded.
ATOL = ATTENTION_ATOL
LENGTHS = (1, 15, 16, 17, 300)
PARTS = 4


def random_lists(rows: DeviceRows, width: int, share: float = 0.4):
    """Some keys of each row, the last one among them; weights for each head, or for all.

    A head may read nothing of a list, and some lists are empty. What is behind them is poison.
    """
    random = np.random.default_rng(0)
    kv_heads = rows.kv_cache.shape[1]
    num_lists, capacity = len(rows.lengths) * kv_heads, max(rows.lengths) + 3
    tokens = np.full((num_lists, capacity), 1 << 28, np.int32)
    weights = np.full((num_lists, capacity, width), np.nan, np.float32)
    counts = np.zeros(num_lists, np.int32)
    for item in range(num_lists):
        length = rows.lengths[item // kv_heads]
        if length == 0 or item == 2:
            continue
        chosen = np.flatnonzero(random.random(length) < share)
        chosen = np.union1d(chosen, [length - 1])
        count = counts[item] = len(chosen)
        tokens[item, :count] = chosen
        own = -np.log(random.choice(np.array([1.0, 1.0, 0.3, 0.01]), (count, width)))
        if width > 1:
            own[random.random(own.shape) < 0.5] = NOT_SELECTED
            own[:, item % width] = NOT_SELECTED
        weights[item, :count] = own
    return tokens, weights, counts


def attend(
    rows: DeviceRows,
    tokens,
    weights,
    counts,
    scaling: float | None = None,
    whole=None,
    sinks: torch.Tensor | None = None,
):
    num_queries, heads, size = rows.query.shape
    kv_heads = rows.kv_cache.shape[1]
    output = torch.full(rows.query.shape, torch.nan, device=DEVICE)
    space = AttentionWorkspace.of(num_queries + 1, heads, kv_heads, size, DEVICE, PARTS)
    for part in (space.top, space.mass, space.sums):
        part.fill_(torch.nan)

    def moved(array):
        return None if array is None else torch.from_numpy(array).to(DEVICE)

    if tokens is None:
        tokens = np.tile(np.arange(max(counts), dtype=np.int32), (len(counts), 1))
    if whole is None:
        whole = np.zeros(num_queries, np.int32)

    attend_lists(
        rows.query,
        rows.kv_cache,
        rows.batch,
        moved(tokens),
        moved(weights),
        moved(counts),
        size**-0.5 if scaling is None else scaling,
        output,
        space,
        moved(whole),
        None if sinks is None else sinks.to(DEVICE),
    )
    return output.cpu()


def expected(
    rows: DeviceRows,
    tokens,
    weights,
    counts,
    scaling: float | None = None,
    sinks: torch.Tensor | None = None,
):
    query = rows.query.cpu().double()
    num_queries, heads, size = query.shape
    kv_heads = rows.kv_cache.shape[1]
    group = heads // kv_heads
    result = torch.zeros(query.shape, dtype=torch.float64)
    for item in range(num_queries * kv_heads):
        row, kv_head, count = item // kv_heads, item % kv_heads, int(counts[item])
        if count == 0:
            continue
        places = np.arange(count) if tokens is None else tokens[item, :count]
        key = rows.host.keys[row][0, kv_head, places].double()
        value = rows.host.values[row][0, kv_head, places].double()
        for h in range(group):
            head = kv_head * group + h
            logits = key @ query[row, head] * (size**-0.5 if scaling is None else scaling)
            if weights is not None:
                own = torch.from_numpy(weights[item, :count, min(h, weights.shape[2] - 1)])
                logits = (logits + own).masked_fill(own == NOT_SELECTED, -torch.inf)
            if (logits > -torch.inf).any():
                own = logits if sinks is None else torch.cat([logits, sinks[head : head + 1]])
                result[row, head] = own.softmax(0)[:count] @ value
    return result


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_size", "block_size", "dtype"),
    [
        (2, 2, 64, 16, torch.float32),
        (4, 2, 32, 32, torch.float16),
        (3, 1, 80, 16, torch.bfloat16),
        (8, 2, 128, 16, torch.float16),
        (7, 1, 64, 128, torch.bfloat16),
        (16, 2, 80, 32, torch.float32),
    ],
)
def test_lists_with_and_without_weights(heads, kv_heads, head_size, block_size, dtype) -> None:
    """Groups of 1, 2, 3, 4, 7 and 8 heads; empty lists and heads that read nothing are 0."""
    shape = shape_of(heads, kv_heads, head_size, block_size, dtype)
    rows = device_rows(shape, LENGTHS, exact=False, spare_keys=3)
    for width in {1, heads // kv_heads}:
        tokens, weights, counts = random_lists(rows, width)
        for own in (weights, None):
            found = attend(rows, tokens, own, counts)
            right = expected(rows, tokens, own, counts)
            assert (found.double() - right).abs().max() <= ATOL[dtype]
            assert (found[right == 0] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_learned_sinks(dtype: torch.dtype) -> None:
    """One more logit per query head, without a value: by the keys' own size, and far from it."""
    rows = device_rows(shape_of(6, 2, 32, dtype=dtype), LENGTHS, exact=False)
    tokens, weights, counts = random_lists(rows, 3)
    whole = np.array([n if i % 2 else 0 for i, n in enumerate(rows.lengths)], np.int32)
    for offset in (0.0, -300.0, 300.0):
        sinks = (torch.linspace(-2, 4, 6) + offset).to(dtype)
        found = attend(rows, tokens, weights, counts, whole=whole, sinks=sinks)
        right = expected(rows, tokens, weights, counts, sinks=sinks)
        every = np.repeat(rows.lengths, 2).astype(np.int32)
        right[whole > 0] = expected(rows, None, None, every, sinks=sinks)[whole > 0]
        assert (found.double() - right).abs().max() <= ATOL[dtype]
        assert (found[right == 0].abs() <= 1e-30).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_every_key_before_a_count(dtype: torch.dtype) -> None:
    """Dense rows, of one part and of many: of 192 keys each, and of 320 in the longest row."""
    rows = device_rows(shape_of(2, 1, 32, 16, dtype), (1, 128, 129, 512, 1100), exact=False)
    counts = np.array(rows.lengths, np.int32)
    right = expected(rows, None, None, counts)
    listed = attend(rows, None, None, counts)
    assert (listed.double() - right).abs().max() <= ATOL[dtype]
    assert torch.equal(attend(rows, None, None, 0 * counts, whole=counts), listed)


@pytest.mark.parametrize("width", [0, 1, 2])
def test_queries_that_read_all_keys_among_others(width: int) -> None:
    """As by a list of all keys with weight 1, whatever their own list is; padding is zeros."""
    rows = device_rows(shape_of(4, 2, 32), LENGTHS, exact=False)
    tokens, weights, counts = random_lists(rows, max(1, width))
    whole = np.array([n if i % 2 else 0 for i, n in enumerate(rows.lengths)], np.int32)
    assert 0 in whole[np.array(rows.lengths) > 0]
    own = weights if width else None
    right = expected(rows, tokens, own, counts)
    every = expected(rows, None, None, np.repeat(rows.lengths, 2).astype(np.int32))
    right[whole > 0] = every[whole > 0]
    rows.batch.lengths[torch.from_numpy(whole > 0).to(DEVICE)] = 0
    found = attend(rows, tokens, own, counts, whole=whole)
    assert (found.double() - right).abs().max() <= ATOL[torch.float32]
    assert (found[[n == 0 for n in rows.lengths]] == 0).all()


def test_an_output_in_the_cache_type() -> None:
    rows = device_rows(shape_of(2, 1, 32, 16, torch.float16), LENGTHS, exact=False)
    counts = torch.tensor(rows.lengths, dtype=torch.int32, device=DEVICE)
    output = torch.zeros_like(rows.query)
    space = AttentionWorkspace.of(len(counts), 2, 1, 32, DEVICE, PARTS)
    arguments = (rows.query, rows.kv_cache, rows.batch, counts[:, None], None, 0 * counts, 0.2)
    attend_lists(*arguments, output, space, counts)
    whole = attend(rows, None, None, counts.cpu().numpy(), 0.2)
    assert torch.equal(output.cpu(), whole.half())


def test_extreme_scores() -> None:
    """Scores far apart, all equal, and so low that plain powers would vanish."""
    rows = device_rows(shape_of(1, 1, 32), (100,), exact=False)
    counts = np.array(rows.lengths, np.int32)
    for factor in (0.0, 1e4, -1e4):
        rows.query.fill_(factor)
        found = attend(rows, None, None, counts, 1.0)
        difference = found.double() - expected(rows, None, None, counts, 1.0)
        assert difference.abs().max() <= ATOL[torch.float32]


def test_other_blocks_and_other_neighbours_change_no_bit() -> None:
    rows = device_rows(shape_of(4, 2, 32), (300, 1, 900), exact=False)
    tokens, weights, counts = random_lists(rows, 2, share=0.9)
    found = attend(rows, tokens, weights, counts)
    assert counts.max() > 512  # more than four parts
    assert torch.equal(attend(permuted(rows), tokens, weights, counts), found)
    for row in range(len(rows.lengths)):
        own = slice(2 * row, 2 * row + 2)
        batch = DeviceBatch(
            rows.batch.block_table,
            rows.batch.rows[row : row + 1],
            rows.batch.lengths[row : row + 1],
        )
        alone = DeviceRows(
            rows.host, rows.kv_cache, batch, rows.query[row : row + 1], rows.lengths[row : row + 1]
        )
        again = attend(alone, tokens[own], weights[own], counts[own])
        assert torch.equal(again[0], found[row])


def test_what_does_not_fit_is_refused() -> None:
    rows = device_rows(shape_of(4, 2, 32), (3, 2))
    lists = torch.zeros(6, 8, dtype=torch.int32, device=DEVICE)
    good = {
        "query": rows.query,
        "kv_cache": rows.kv_cache,
        "batch": rows.batch,
        "tokens": lists,
        "log_weights": torch.zeros(6, 8, 2, device=DEVICE),
        "counts": lists[:, 0].contiguous(),
        "scaling": 1.0,
        "output": torch.empty_like(rows.query),
        "workspace": AttentionWorkspace.of(3, 4, 2, 32, DEVICE, PARTS),
        "whole": torch.zeros(3, dtype=torch.int32, device=DEVICE),
    }
    attend_lists(**good)
    for message, change in {
        "do not fit a cache": {"query": rows.query[:, :3].contiguous()},
        "with strides": {"query": rows.query.transpose(1, 2).contiguous().transpose(1, 2)},
        "cache must be contiguous": {"kv_cache": rows.kv_cache.repeat(1, 1, 1, 2)[..., ::2]},
        "output must be": {"output": rows.query[:1]},
        "does not fit queries": {"workspace": AttentionWorkspace.of(2, 4, 2, 32, DEVICE)},
        "6, 5 lists": {"tokens": lists[:5]},
        "log weights of": {"log_weights": torch.zeros(6, 8, 3, device=DEVICE)},
        "logits of sinks": {"sink_logits": torch.zeros(2, device=DEVICE)},
    }.items():
        with pytest.raises(ValueError, match=message):
            attend_lists(**(good | change))
