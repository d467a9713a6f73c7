"""Caches of 8 bits on the device: the host's bytes, and with each masker the host's answers."""

from pathlib import Path

import numpy as np
import pytest
import torch

from sparse_attention_hub.sparse_attention.serialization import config_from_dict
from tests.hub.top_k_maskers import HEAD_SIZE
from tests.plugin.paged.masker_lists import NAMES, masker_list
from tests.plugin.paged.paged_rows import Rows, make_rows, paged_attention, shape_of
from tests.plugin.triton.device_rows import on_device
from tests.plugin.triton.interpreter import DEVICE
from tests.plugin.triton.paged_caches import assert_same_bytes, written_in_steps
from tests.plugin.triton.row_order import from_device
from tests.tolerances import ATTENTION_ATOL
from vllm_sparse_plugin.paged.cache_scales import CacheScales
from vllm_sparse_plugin.paged.device.attention import KEYS_READ, DeviceAttention
from vllm_sparse_plugin.paged.device.cache import DeviceCache
from vllm_sparse_plugin.paged.device.space import DeviceSpace
from vllm_sparse_plugin.paged.layout import BlockLayout, LayerCache, stored_as
from vllm_sparse_plugin.paged.page_bounds import PageBounds
from vllm_sparse_plugin.paged.triton_kernels.writing import write_rows

DTYPE = torch.float8_e4m3fn
# Powers of 2, with which both sides round alike; and others.
EXACT, OTHER = CacheScales(0.5, 0.25), CacheScales(0.3, 0.07)
LENGTHS = (1, 0, 16, 33, 120)
CAPACITY = 128
# Their codes are those of sequences, which `test_device_learned` plans.
SINKS = {"maskers": [{"type": "sink", "sink_size": 64}]}
LEARNED = ("pq", "magic pig")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scales", [EXACT, OTHER], ids=str)
def test_what_is_stored(dtype: torch.dtype, scales: CacheScales) -> None:
    """Both sides of every number that there is, and what is beyond all of them."""
    bits = torch.arange(0x7E, dtype=torch.uint8).view(DTYPE).float()
    middle = (bits[1:] + bits[:-1]) / 2
    near = torch.cat([bits, middle, middle * 1.01, middle * 0.99, torch.tensor([470.0, 1e4])])
    numbers = torch.cat([near, -near, torch.zeros(512)])[:1024].view(8, 2, 64)
    key, value = (numbers * scales.key).to(dtype), (numbers * scales.value).to(dtype)
    kv_cache = torch.zeros(2, 2, 16, 128, dtype=DTYPE, device=DEVICE)
    slots = torch.tensor([17, 3, 0, 31, 8, 9, 20, -1], device=DEVICE)
    write_rows(key.to(DEVICE), value.to(DEVICE), kv_cache, slots, scales)
    stored = kv_cache.cpu().view(torch.uint8).transpose(1, 2).reshape(32, 2, 2, 64)
    places = slots[:-1].cpu()
    for side, rows, scale in ((0, key, scales.key), (1, value, scales.value)):
        expected = stored_as(rows[:-1], DTYPE, scale).view(torch.uint8)
        assert torch.equal(stored[places, :, side], expected)
    untouched = [place for place in range(32) if place not in places.tolist()]
    assert (stored[untouched] == 0).all()


@pytest.mark.parametrize("bits", [4, 16])
def test_what_pages_write_themselves(bits: int) -> None:
    """New keys and values with their bounds, of numbers that are rounded, and of some too large."""
    index = PageBounds(8, bits)
    layout = BlockLayout(shape_of(4, 2, 32, 16, DTYPE), (index,))
    width = layout.bytes_per_token
    host = LayerCache.of(torch.zeros(2, 2, 16, width, dtype=DTYPE), layout, 0, OTHER)
    generator = torch.Generator().manual_seed(3)
    key, value = (torch.randn(16, 2, 32, generator=generator) * 60 for _ in range(2))
    assert (key / OTHER.key).abs().max() > 448
    slots = torch.arange(16, 32)
    host.write(key, value, slots)
    space = DeviceSpace(layout.shape, 8, CAPACITY, 512, torch.device(DEVICE))
    kv_cache = torch.zeros(2, 2, 16, width, dtype=DTYPE, device=DEVICE)
    cache = DeviceCache.of(kv_cache, layout, 0, space, OTHER)
    assert [own.writes_rows for own in cache.indices.values()] == [True]
    cache.write(key.to(DEVICE), value.to(DEVICE), slots.to(DEVICE))
    expected = torch.from_numpy(host.records)
    assert torch.equal(
        from_device(kv_cache, layout.shape).view(torch.uint8).flatten(), expected.flatten()
    )


def _rows(name: str, folder: Path, scales: CacheScales, exact: bool = True):
    maskers = masker_list(name, folder, heads=4)
    attention, layout = paged_attention(maskers, shape_of(4, 2, HEAD_SIZE, 16, DTYPE))
    rows = make_rows(layout, LENGTHS, exact=exact, layer_index=1, scales=scales)
    return maskers, attention, layout, rows


def _space(rows: Rows) -> DeviceSpace:
    return DeviceSpace(rows.cache.layout.shape, 8, CAPACITY, 512, torch.device(DEVICE))


@pytest.mark.parametrize("name", [name for name in NAMES if name not in LEARNED])
@pytest.mark.parametrize("scales", [EXACT, OTHER], ids=str)
def test_blocks_have_the_same_bytes(name: str, scales: CacheScales, tmp_path: Path) -> None:
    """Keys, values and index, written in steps of all sequences."""
    *_, layout, rows = _rows(name, tmp_path, scales)

    def write(kv_cache, key, value, slots) -> None:
        DeviceCache.of(kv_cache, layout, 1, _space(rows), scales).write(key, value, slots)

    assert_same_bytes(rows, written_in_steps(rows, write))


@pytest.mark.parametrize("name", [name for name in NAMES if name not in LEARNED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_masker_gives_the_host_s_answers(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    maskers, attention, layout, rows = _rows(name, tmp_path, EXACT)
    expected, read = attention.attend(rows.query.numpy(), rows.cache, rows.batch, HEAD_SIZE**-0.5)
    device, space = on_device(rows), _space(rows)
    attention = DeviceAttention(config_from_dict({"maskers": maskers}).masker_configs, space)
    cache = DeviceCache.of(device.kv_cache, layout, 1, space, EXACT)
    sizes = torch.from_numpy(attention.sizes(np.array(device.lengths))).to(DEVICE)
    query = device.query.to(dtype)
    output = torch.full(query.shape, -7.0, dtype=torch.float32, device=DEVICE)
    counts = torch.zeros(len(device.lengths), 3, dtype=torch.int64, device=DEVICE)
    attention.attend(query, cache, device.batch, sizes, HEAD_SIZE**-0.5, output, counts)
    assert counts[: len(LENGTHS), KEYS_READ].tolist() == read.keys.tolist()
    is_query = np.array(LENGTHS) > 0
    error = np.abs(output[: len(LENGTHS)].cpu().numpy() - expected)[is_query].max()
    # Values are of order 1, and weights are rounded to the type of the queries.
    assert error <= ATTENTION_ATOL[dtype]
    assert (output.cpu()[len(LENGTHS) :] == 0).all()


def test_queries_are_not_rounded_to_eight_bits() -> None:
    """Float16s, which are multiplied as such."""
    shape = shape_of(4, 2, 32, 16, DTYPE)
    rows = make_rows(BlockLayout(shape), (40,), exact=False, scales=EXACT)
    device, space = on_device(rows), _space(rows)
    cache = DeviceCache.of(device.kv_cache, rows.cache.layout, 0, space, EXACT)
    attention = DeviceAttention(config_from_dict(SINKS).masker_configs, space)
    sizes = torch.from_numpy(attention.sizes(np.array(device.lengths))).to(DEVICE)
    query = (3 * device.query).to(torch.float16)
    output = torch.zeros_like(query, dtype=torch.float32)
    counts = torch.zeros(2, 3, dtype=torch.int64, device=DEVICE)
    attention.attend(query, cache, device.batch, sizes, 1.0, output, counts)
    key, value = (t[0].double().repeat_interleave(2, 0) for t in (rows.keys[0], rows.values[0]))
    weights = torch.einsum("hd,hkd->hk", query[0].cpu().double(), key).softmax(dim=-1)
    expected = torch.einsum("hk,hkd->hd", weights, value)
    assert (output[0].cpu().double() - expected).abs().max() <= ATTENTION_ATOL[torch.float16]


def test_values_have_their_own_scale() -> None:
    """Of a dense query, with scales that are no powers of 2, against float64."""
    rows = make_rows(BlockLayout(shape_of(4, 2, 32, 16, DTYPE)), (40,), exact=False, scales=OTHER)
    device, space = on_device(rows), _space(rows)
    attention = DeviceAttention(config_from_dict(SINKS).masker_configs, space)
    cache = DeviceCache.of(device.kv_cache, rows.cache.layout, 0, space, OTHER)
    sizes = torch.from_numpy(attention.sizes(np.array(device.lengths))).to(DEVICE)
    output = torch.zeros_like(device.query)
    counts = torch.zeros(2, 3, dtype=torch.int64, device=DEVICE)
    sinks = torch.linspace(-1, 2, 4, device=DEVICE)
    attention.attend(
        device.query, cache, device.batch, sizes, 0.2, output, counts, sink_logits=sinks
    )
    key, value = (t[0].double().repeat_interleave(2, 0) for t in (rows.keys[0], rows.values[0]))
    scores = torch.einsum("hd,hkd->hk", rows.query[0].double(), key) * 0.2
    weights = torch.cat([scores, sinks.cpu()[:, None].double()], 1).softmax(dim=-1)[:, :-1]
    expected = torch.einsum("hk,hkd->hd", weights, value)
    assert (output[0].cpu().double() - expected).abs().max() <= ATTENTION_ATOL[torch.float32]
