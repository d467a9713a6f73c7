"""The planner on the device against the one on CPUs: every masker, the same keys and outputs."""

from pathlib import Path

import numpy as np
import pytest
import torch

from sparse_attention_hub.sparse_attention.serialization import config_from_dict
from tests.plugin.paged import test_double_sparsity_top_k as double_sparsity
from tests.plugin.paged import test_hash_attention_top_k as hash_attention
from tests.plugin.paged.paged_rows import SINK_LOCAL, make_rows, paged_attention, shape_of
from tests.plugin.triton.device_rows import DeviceRows, on_device
from tests.plugin.triton.interpreter import DEVICE
from tests.tolerances import ATTENTION_ATOL
from vllm_sparse_plugin.paged.attention import ReadCounts
from vllm_sparse_plugin.paged.device.attention import (
    KEYS_READ,
    ROWS_READ,
    ROWS_SCORED,
    DeviceAttention,
)
from vllm_sparse_plugin.paged.device.cache import DeviceCache
from vllm_sparse_plugin.paged.device.maskers import base as registry
from vllm_sparse_plugin.paged.device.maskers import top_k
from vllm_sparse_plugin.paged.device.space import DeviceSpace
from vllm_sparse_plugin.paged.layout import BlockLayout, BlockShape
from vllm_sparse_plugin.paged.maskers.base import Unsupported
from vllm_sparse_plugin.paged.maskers.local import PagedLocalMasker

CAPACITY = 320
LENGTHS = (1, 16, 33, 300)
UNWRITTEN = -7.0
QUEST = {"type": "quest_top_k", "heavy_size": 0.2, "page_size": 16, "label_bits": 8}


def space_of(shape: BlockShape, max_queries: int = 8, capacity: int = CAPACITY) -> DeviceSpace:
    return DeviceSpace(shape, max_queries, capacity, 64, torch.device(DEVICE))


def attend_on_device(
    maskers: list[dict], layout: BlockLayout, rows: DeviceRows, space: DeviceSpace
) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs and counts, padding included; one launch after the other, as in a step."""
    attention = DeviceAttention(config_from_dict({"maskers": maskers}).masker_configs, space)
    cache = DeviceCache.of(rows.kv_cache, layout, rows.host.cache.layer_index, space)
    sizes = torch.from_numpy(attention.sizes(np.array(rows.lengths))).to(DEVICE)
    output = torch.full(rows.query.shape, UNWRITTEN, device=DEVICE)
    counts = torch.zeros(len(rows.lengths), 3, dtype=torch.int64, device=DEVICE)
    scaling = rows.query.shape[-1] ** -0.5
    attention.attend(rows.query.float(), cache, rows.batch, sizes, scaling, output, counts)
    return output.cpu(), counts.cpu()


def assert_like_the_host(
    maskers: list[dict],
    shape: BlockShape,
    lengths: tuple[int, ...] = LENGTHS,
    max_queries: int = 8,
    exact: bool = True,
    capacity: int = CAPACITY,
) -> ReadCounts:
    attention, layout = paged_attention(maskers, shape)
    rows = make_rows(layout, lengths, exact=exact)
    scaling = shape.head_size**-0.5
    expected, read = attention.attend(rows.query.float().numpy(), rows.cache, rows.batch, scaling)
    space = space_of(shape, max_queries, capacity)
    found, counts = attend_on_device(maskers, layout, on_device(rows), space)
    number = len(lengths)
    assert counts[:number, KEYS_READ].tolist() == read.keys.tolist()
    assert (counts[number:] == 0).all()
    is_query = np.array(lengths) > 0
    error = np.abs(found[:number].numpy() - expected)[is_query].max()
    assert error <= ATTENTION_ATOL[shape.dtype]
    assert (found[number:] == 0).all()  # padding
    assert (found[:number][~is_query] == 0).all()
    return ReadCounts(read.keys, counts[:number].numpy())


@pytest.mark.parametrize("granularity", ["kv_head", "query_head"])
@pytest.mark.parametrize(
    "masker",
    [
        QUEST,
        {**QUEST, "heavy_size": 48, "label_bits": 4},
        {"type": "oracle_top_k", "heavy_size": 0.1},
        {"type": "oracle_top_k", "heavy_size": 40},
    ],
    ids=str,
)
def test_top_k(masker: dict, granularity: str) -> None:
    maskers = [*SINK_LOCAL, {**masker, "head_granularity": granularity}]
    assert_like_the_host(maskers, shape_of(8, 2, 32, 32))


@pytest.mark.parametrize("size", [0.1, 40])
@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 2), (2, 2)])
def test_single_keys_of_long_sequences(
    size: float, heads: int, kv_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of more keys than one program selects from; of groups they are listed at once."""
    monkeypatch.setattr(top_k, "MOST_NUMBERS", 64)
    oracle = {"type": "oracle_top_k", "heavy_size": size, "head_granularity": "kv_head"}
    shape = shape_of(heads, kv_heads, 32, 32)
    assert_like_the_host([*SINK_LOCAL, oracle], shape, (1, 0, 33, 300, 7), max_queries=2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    assert_like_the_host([*SINK_LOCAL, QUEST], shape_of(6, 2, 64, 16, dtype))


@pytest.mark.parametrize("granularity", ["kv_head", "query_head"])
def test_a_capacity_of_no_whole_pages(granularity: str) -> None:
    """The last page of the longest sequence has a score too, in nobody else's place."""
    quest = {**QUEST, "page_size": 32, "heavy_size": 40, "head_granularity": granularity}
    shape = shape_of(4, 2, 32, 32)
    assert_like_the_host([quest], shape, (112, 111, 112, 110), max_queries=4, capacity=112)


def test_top_p() -> None:
    assert_like_the_host([*SINK_LOCAL, {"type": "oracle_top_p", "top_p": 0.7}], shape_of(4, 2))


@pytest.mark.parametrize("granularity", ["kv_head", "query_head"])
def test_double_sparsity(tmp_path: Path, granularity: str) -> None:
    """Of small integers, keys would tie but for the last bits of their labels' products."""
    config = double_sparsity.config(tmp_path, 2, 4, granularity)
    assert_like_the_host([*SINK_LOCAL, config], shape_of(8, 2, 32, 32), exact=False)


@pytest.mark.parametrize(("bits", "rows"), [(2, 2), (4, 2), (8, 2), (16, 2), (4, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_labels_of_long_sequences(
    tmp_path: Path, bits: int, rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compared twice, or once where their scores are less to store than they are to load."""
    monkeypatch.setattr(top_k, "MOST_NUMBERS", 64)
    config = double_sparsity.config(tmp_path, rows, bits, "kv_head", heavy_size=0.1)
    shape, lengths = shape_of(8, 2, 32, 32, dtype), (1, 0, 33, 300, 7)
    assert_like_the_host([*SINK_LOCAL, config], shape, lengths, max_queries=2, exact=False)


def test_hash_attention(tmp_path: Path) -> None:
    config = hash_attention.config(tmp_path, 8)
    assert_like_the_host([*SINK_LOCAL, config], shape_of(8, 2, 32, 32))


@pytest.mark.parametrize("granularity", ["kv_head", "query_head"])
def test_sampling(granularity: str) -> None:
    """After a masker of KV heads, and after one of query heads."""
    sample = {"type": "random_sampling", "sampling_rate": 0.2, "head_granularity": granularity}
    oracle = {"type": "oracle_top_k", "heavy_size": 0.1, "head_granularity": "query_head"}
    assert_like_the_host([*SINK_LOCAL, sample], shape_of(4, 2))
    assert_like_the_host([*SINK_LOCAL, oracle, sample], shape_of(4, 2))


@pytest.mark.parametrize("granularity", ["kv_head", "query_head"])
def test_adaptive_sampling(granularity: str) -> None:
    sample = {
        "type": "adaptive_sampling",
        "base_rate_sampling": 0.1,
        "epsilon": 0.2,
        "delta": 0.2,
        "init_offset": 2,
        "local_offset": 2,
        "head_granularity": granularity,
    }
    read = assert_like_the_host([QUEST, sample], shape_of(4, 2), exact=False)
    # What was selected before is looked at, and a base sample.
    assert (read.loaded_bytes[:, ROWS_SCORED] > 0)[1:].all()


def test_queries_in_slices_and_groups_of_three() -> None:
    """More queries than a launch takes, with padding in the last slice."""
    read = assert_like_the_host(
        [*SINK_LOCAL, {**QUEST, "head_granularity": "kv_head"}],
        shape_of(6, 2, 64, 16),
        (7, 100, 0, 31, 64),
        max_queries=2,
    )
    rows = read.loaded_bytes[:, ROWS_READ]
    assert (rows * 3 == read.keys).all()  # of groups of three that share their lists


def test_a_row_is_the_same_in_any_batch_and_slice() -> None:
    """Bit for bit."""
    maskers = [*SINK_LOCAL, QUEST]
    shape = shape_of(8, 2, 32, 16)
    _, layout = paged_attention(maskers, shape)
    rows = on_device(make_rows(layout, (40, 300, 129), exact=False))
    together, _ = attend_on_device(maskers, layout, rows, space_of(shape))
    sliced, _ = attend_on_device(maskers, layout, rows, space_of(shape, 1))
    assert torch.equal(together, sliced)


def test_layers_with_the_same_maskers_share_their_memory() -> None:
    shape = shape_of()
    space = space_of(shape)
    configs = config_from_dict({"maskers": [*SINK_LOCAL, QUEST]}).masker_configs
    DeviceAttention(configs, space)
    held = space.scratch_bytes
    DeviceAttention(configs, space)
    assert space.scratch_bytes == held > 0


def test_what_has_no_counterpart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(registry._COUNTERPARTS, PagedLocalMasker)
    configs = config_from_dict({"maskers": SINK_LOCAL}).masker_configs
    with pytest.raises(Unsupported, match="no counterpart on CUDA"):
        DeviceAttention(configs, space_of(shape_of()))


def test_a_cache_of_another_layout_is_refused() -> None:
    shape = shape_of()
    kv_cache = torch.zeros(2, 2, 32, 64)
    with pytest.raises(ValueError, match="must be contiguous"):
        DeviceCache.of(kv_cache.transpose(1, 2), BlockLayout(shape), 0, space_of(shape))
