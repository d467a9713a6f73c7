"""Double Sparsity on pages: the labels that the masker makes, and the keys that it selects."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_attention_hub.sparse_attention.research_attention.maskers.fixed import (
    DoubleSparsityTopKMaskerConfig,
)
from sparse_attention_hub.sparse_attention.research_attention.maskers.fixed.implementations.utils.common_utils import (  # noqa: E501
    pseudo_quantize,
)
from tests.plugin.paged.label_rows import (
    assert_independent_rows,
    assert_same_keys,
    assert_same_scores,
    at_slots,
    rebuilt,
    slots_of,
)
from tests.plugin.paged.paged_rows import (
    SINK_LOCAL,
    attend,
    make_rows,
    paged_attention,
    shape_of,
)
from vllm_sparse_plugin.paged.channel_labels import ChannelLabels, stored_labels
from vllm_sparse_plugin.paged.layout import BlockLayout, LayerCache
from vllm_sparse_plugin.paged.maskers.base import Unsupported

HEAD_SIZE, LAYERS = 32, (0, 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("channels")


def channel_file(folder: Path, rows: int) -> str:
    """Other channels for every layer, projection and head."""
    generator = torch.Generator().manual_seed(rows)
    path = folder / f"{rows}.json"
    data = {
        f"model.layers.{layer}.self_attn.{projection}": [
            torch.randperm(HEAD_SIZE, generator=generator).tolist() for _ in range(rows)
        ]
        for layer in LAYERS
        for projection in ("qk_proj", "q_proj")
    }
    path.write_text(json.dumps(data))
    return str(path)


def config(folder: Path, rows: int, bits: int = 16, granularity: str = "query_head", **fields):
    return {
        "type": "double_sparsity_top_k",
        "heavy_size": 0.15,
        "sorted_channel_file": channel_file(folder, rows),
        "group_factor": 4,
        "label_bits": bits,
        "head_granularity": granularity,
        **fields,
    }


@pytest.mark.parametrize("granularity", ["query_head", "kv_head"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "rows", "block_size"),
    [(8, 2, 8, 32), (8, 2, 2, 32), (9, 3, 9, 128), (9, 3, 3, 32), (3, 3, 3, 128)],
)
def test_same_keys(folder, granularity, heads, kv_heads, rows, block_size) -> None:
    maskers = [*SINK_LOCAL, config(folder, rows, 16, granularity)]
    assert_same_keys(maskers, heads=heads, kv_heads=kv_heads, block_size=block_size)


@pytest.mark.parametrize("granularity", ["query_head", "kv_head"])
@pytest.mark.parametrize("rows", [8, 2])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_same_keys_by_quantised_labels(folder, granularity, rows, bits) -> None:
    maskers = [*SINK_LOCAL, config(folder, rows, bits, granularity, group_factor=5)]
    assert_same_keys(maskers, exact=False, near_ties=1)


@pytest.mark.parametrize(
    "fields",
    [
        {"heavy_size": 40},
        {"heavy_size": 1.0},
        {"channel_selection": "q_proj"},
        {"group_factor": 32},  # one channel
        {"group_factor": 1},
    ],
    ids=str,
)
def test_other_fields(folder, fields) -> None:
    assert_same_keys([config(folder, 8, **fields)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [4, 16])
def test_half_precision(folder, dtype, bits) -> None:
    maskers = [*SINK_LOCAL, config(folder, 2, bits, "kv_head")]
    assert_same_keys(maskers, exact=bits == 16, near_ties=0 if bits == 16 else 1, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [2, 4, 8, 16])
@pytest.mark.parametrize("rows", [8, 2])
def test_same_scores(folder, dtype, bits, rows) -> None:
    assert_same_scores(
        DoubleSparsityTopKMaskerConfig(
            heavy_size=0.1,
            sorted_channel_file=channel_file(folder, rows),
            group_factor=5,
            label_bits=bits,
        ),
        dtype=dtype,
    )


def expected_labels(key: torch.Tensor, channels: np.ndarray, bits: int) -> torch.Tensor:
    """`[keys, KV heads, rows per head, C]` of keys `[KV heads, keys, D]`, by the reference."""
    per_head = len(channels) // key.shape[0]
    rows = [key[row // per_head][:, own] for row, own in enumerate(torch.from_numpy(channels))]
    labels = pseudo_quantize(torch.stack(rows, dim=1).float(), bits)
    return labels.unflatten(1, (key.shape[0], per_head))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [2, 4, 8, 16])
@pytest.mark.parametrize("rows", [8, 2])
def test_the_index_holds_the_reference_s_labels_however_keys_came(folder, dtype, bits, rows):
    index = ChannelLabels(channel_file(folder, rows), "qk_proj", 6, bits)
    shape = shape_of(dtype=dtype)
    layout = BlockLayout(shape, (index,))
    written = make_rows(layout, exact=False, layer_index=1)
    channels = index.channels(1, shape).astype(np.int64)
    stored, again = stored_labels(index, written.cache), stored_labels(index, rebuilt(written))
    for row, keys in enumerate(written.keys):
        slots = slots_of(written, row)
        found = at_slots(stored, slots, shape.block_size)
        assert torch.equal(found, expected_labels(keys[0], channels, bits))
        assert torch.equal(found, at_slots(again, slots, shape.block_size))


@settings(deadline=None, max_examples=40)
@given(
    values=st.lists(st.integers(-300, 300), min_size=HEAD_SIZE, max_size=HEAD_SIZE),
    power=st.integers(-6, 6),
    bits=st.sampled_from([2, 4, 8]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_any_key_is_quantised_as_the_reference_does(folder, values, power, bits, dtype) -> None:
    """Equal values, ties between two codes, small and large steps."""
    shape = shape_of(1, 1, dtype=dtype)
    index = ChannelLabels(channel_file(folder, 1), "qk_proj", 5, bits)
    layout = BlockLayout(shape, (index,))
    width = layout.bytes_per_token // dtype.itemsize
    cache = LayerCache.of(torch.zeros(1, 1, shape.block_size, width, dtype=dtype), layout, 0)
    key = (torch.tensor(values) * 2.0**power).to(dtype)[None, None]
    cache.write(key, key, torch.tensor([7]))
    channels = index.channels(0, shape).astype(np.int64)
    found = stored_labels(index, cache)[0, :, :, 7][None]
    assert torch.equal(found, expected_labels(key, channels, bits))


def test_a_row_does_not_depend_on_its_neighbours(folder) -> None:
    assert_independent_rows([*SINK_LOCAL, config(folder, 8, 4, "kv_head")])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_per_token(folder, dtype) -> None:
    """Codes and two elements, per row of the file."""
    shape, size = shape_of(dtype=dtype), dtype.itemsize
    for rows in (2, 8):
        for bits, per_token in {2: 2, 4: 4, 8: 8}.items():
            index = ChannelLabels(channel_file(folder, rows), "qk_proj", 4, bits)
            assert index.bytes_per_block(shape) == rows // 2 * 32 * (2 * size + per_token)
        index = ChannelLabels(channel_file(folder, rows), "qk_proj", 4, 16)
        assert index.bytes_per_block(shape) == rows // 2 * 32 * 8 * size


@pytest.mark.parametrize(
    ("shape", "fields", "reason"),
    [
        ({}, {"label_bits": 3}, "label_bits 3 is none of"),
        ({}, {"group_factor": 33}, "more than the head size 32"),
        ({"heads": 16}, {}, "has 8 heads of 32 channels"),
        ({"head_size": 64}, {}, "of 64"),
    ],
)
def test_what_has_no_counterpart(folder, shape, fields, reason) -> None:
    with pytest.raises(Unsupported, match=f"double_sparsity_top_k: .*{reason}"):
        paged_attention([config(folder, 8, **fields)], shape_of(**shape))


def test_a_layer_that_the_file_leaves_out(folder) -> None:
    """Its keys get no labels; a masker that asks for them gets the reference's error."""
    attention, layout = paged_attention([config(folder, 8)], shape_of())
    rows = make_rows(layout, layer_index=2)
    with pytest.raises(ValueError, match="no entry 'model.layers.2.self_attn.qk_proj'"):
        attend(attention, rows)
