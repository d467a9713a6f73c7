"""What an attention layer on CUDA holds on to, and what it takes from its engine."""

import weakref
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from vllm.platforms.interface import DeviceCapability

from sparse_attention_hub.sparse_attention.serialization import config_from_dict
from tests.plugin.paged.paged_rows import SINK_LOCAL, shape_of
from tests.plugin.triton.interpreter import DEVICE
from vllm_sparse_plugin import device_backend
from vllm_sparse_plugin.compat import hooks
from vllm_sparse_plugin.device_metadata import DeviceMetadataBuilder
from vllm_sparse_plugin.paged.cache_scales import CacheScales
from vllm_sparse_plugin.paged.device.cache import DeviceCache
from vllm_sparse_plugin.paged.device.cost_model import AttentionCosts, CostModel, StepCosts
from vllm_sparse_plugin.paged.device.planner import DevicePlanner, Limits
from vllm_sparse_plugin.paged.layout import BlockLayout, stored_as
from vllm_sparse_plugin.paged.page_bounds import PageBounds
from vllm_sparse_plugin.request_parameters import RequestParameters
from vllm_sparse_plugin.row_table import RowTable
from vllm_sparse_plugin.step_plan import SparseRow


def test_gpus_before_ampere_are_refused() -> None:
    backend = device_backend.DeviceAttentionBackend
    assert not backend.supports_compute_capability(DeviceCapability(7, 5))
    for capability in ((8, 0), (9, 0), (10, 0)):
        assert backend.supports_compute_capability(DeviceCapability(*capability))


LAYOUT = BlockLayout(shape_of(), (PageBounds(8, 8),))
LAYER = SimpleNamespace(layer_name="model.layers.3.attn", kv_cache_torch_dtype=LAYOUT.shape.dtype)


def planner() -> DevicePlanner:
    own = config_from_dict({"maskers": SINK_LOCAL})
    limits = Limits(max_queries=4, capacity=64, max_tokens=16)
    return DevicePlanner(LAYOUT, limits, torch.device(DEVICE), own)


@pytest.fixture
def layer(monkeypatch: pytest.MonkeyPatch) -> Any:
    """An implementation, without vLLM's own part."""
    held = planner()
    monkeypatch.setattr(device_backend, "planner_of", lambda engine, shape: held)
    implementation = object.__new__(device_backend.DeviceAttentionImpl)
    shape = LAYOUT.shape
    for name, value in {
        "_engine": SimpleNamespace(cache_config=SimpleNamespace(block_size=shape.block_size)),
        "_indices": None,
        "_seen": lambda: None,
        "can_be_sparse": True,
        "head_size": shape.head_size,
        "kv_sharing_target_layer_name": None,
        "num_heads": shape.num_heads,
        "num_kv_heads": shape.num_kv_heads,
        "planner": held,
    }.items():
        setattr(implementation, name, value)
    return implementation


def cache_of(num_blocks: int) -> torch.Tensor:
    shape = LAYOUT.shape
    width = LAYOUT.bytes_per_token // shape.dtype.itemsize
    size = (num_blocks, shape.num_kv_heads, shape.block_size, width)
    return torch.zeros(size, dtype=shape.dtype, device=DEVICE)


def test_a_layer_lets_vllm_free_its_cache(layer: Any) -> None:
    """vLLM makes a small one to see what graphs take, and frees it before it makes the real one."""
    first = cache_of(2)
    gone = weakref.ref(first)
    assert layer._cache(LAYER, first).kv_cache is first
    del first
    assert gone() is None
    second = cache_of(3)
    assert layer._cache(LAYER, second).kv_cache is second
    with pytest.raises(ValueError, match="must be contiguous"):
        layer._cache(LAYER, second.transpose(1, 2))


def test_a_cache_of_bytes_has_the_scales_that_the_model_was_loaded_with(
    layer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = replace(LAYOUT.shape, dtype=torch.float8_e4m3fn)
    small = DevicePlanner(
        BlockLayout(shape, LAYOUT.indices),
        Limits(max_queries=4, capacity=64, max_tokens=16),
        torch.device(DEVICE),
        config_from_dict({"maskers": SINK_LOCAL}),
    )
    asked = []
    monkeypatch.setattr(
        device_backend, "planner_of", lambda engine, own: asked.append(own) or small
    )
    width = small.layout.bytes_per_token
    size = (2, shape.num_kv_heads, shape.block_size, width)
    kv_cache = torch.zeros(size, dtype=torch.uint8, device=DEVICE)
    own = SimpleNamespace(
        layer_name="model.layers.3.attn",
        kv_cache_torch_dtype=torch.uint8,
        _k_scale_float=1.0,
        _v_scale_float=1.0,
    )
    layer._reserve(own)
    assert layer._cache(own, kv_cache).scales == CacheScales(1.0, 1.0)
    own._k_scale_float, own._v_scale_float = 0.5, 2.0
    cache = layer._cache(own, kv_cache)
    assert cache.scales == CacheScales(0.5, 2.0)
    assert cache.kv_cache.dtype == torch.float8_e4m3fn
    assert cache.kv_cache.data_ptr() == kv_cache.data_ptr()
    assert set(asked) == {shape}


def test_the_general_path_reads_the_model_s_numbers(
    layer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = replace(LAYOUT.shape, dtype=torch.float8_e4m3fn)
    layout, scales = BlockLayout(shape), CacheScales(0.5, 3.0)
    size = (4, shape.num_kv_heads, shape.block_size, layout.bytes_per_token)
    kv_cache = torch.zeros(size, dtype=shape.dtype, device=DEVICE)
    cache = DeviceCache(kv_cache, layout, 0, {}, scales)
    generator = torch.Generator().manual_seed(0)
    count = shape.block_size + 5
    key, value = (
        torch.randn(count, shape.num_kv_heads, shape.head_size, generator=generator).to(DEVICE)
        for _ in range(2)
    )
    blocks = torch.tensor([[2, 1, 9]], device=DEVICE)
    place = torch.arange(count, device=DEVICE)
    slots = blocks[0, place // shape.block_size] * shape.block_size + place % shape.block_size
    cache.write(key, value, slots)
    asked: list[Any] = []
    monkeypatch.setattr(device_backend, "attend_generally", lambda *all: asked.extend(all))
    group = SimpleNamespace(rows=[], config_json="", counts=None)
    query = torch.zeros(1, shape.num_heads, shape.head_size, dtype=torch.bfloat16)
    layer.scale, layer.sinks = 1.0, None
    layer._attend_generally(group, query, cache, SimpleNamespace(block_table=blocks), query)
    found = asked[1](SimpleNamespace(row=0, seq_len=count))
    for rows, written, scale in zip(found, (key, value), (0.5, 3.0), strict=True):
        assert rows.dtype == torch.bfloat16
        stored = stored_as(written, shape.dtype, scale).float() * scale
        assert torch.equal(rows[0].transpose(0, 1), stored.to(torch.bfloat16))


def test_a_profiling_run_asks_for_all_memory(layer: Any) -> None:
    memory = layer.planner.memory
    assert "scratch" not in vars(memory)
    layer._reserve(LAYER)
    assert vars(memory)["scratch"].nbytes > 0
    _, indices = layer._indices
    assert list(indices) == list(LAYOUT.indices)
    assert layer._cache(LAYER, cache_of(2)).indices is indices
    layer._reserve(LAYER)
    assert layer._indices[1] is indices


def test_nobody_reads_the_index_of_a_layer_that_stays_dense(layer: Any) -> None:
    layer.can_be_sparse = False
    assert not layer.has_index
    assert layer._cache(LAYER, cache_of(2)).indices == {}


@pytest.mark.parametrize("is_of_keys_alone", [True, False])
def test_a_layer_reads_what_another_one_s_index_says_of_the_keys_alone(
    layer: Any, monkeypatch: pytest.MonkeyPatch, is_of_keys_alone: bool
) -> None:
    monkeypatch.setattr(PageBounds, "is_of_keys_alone", is_of_keys_alone)
    layer.kv_sharing_target_layer_name = "a"
    assert not layer.has_index
    read = list(layer._cache(LAYER, cache_of(2)).indices)
    assert read == (list(LAYOUT.indices) if is_of_keys_alone else [])


def test_counts_are_taken_in_before_a_worker_sleeps(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.worker.gpu_worker import Worker

    happened: list[Any] = []
    table = SimpleNamespace(
        statistics=SimpleNamespace(settle=lambda: happened.append("counts are taken in"))
    )
    monkeypatch.setattr("vllm_sparse_plugin.row_table.row_table", lambda config: table)
    monkeypatch.setattr(hooks, "is_selected", lambda config: config == "sparse")
    monkeypatch.setattr(Worker, "sleep", lambda self, level=1: happened.append(level))
    hooks._hook_sleep()
    hooks._hook_sleep()  # once is enough
    Worker.sleep(SimpleNamespace(vllm_config="sparse"), level=2)
    Worker.sleep(SimpleNamespace(vllm_config="dense"))
    assert happened == ["counts are taken in", 2, 1]


@pytest.mark.parametrize(("rows", "in_graph"), [(4, True), (5, False)])
def test_batches_that_no_graph_holds_cost_what_launches_do(rows: int, in_graph: bool) -> None:
    """Sparse pays in graphs alone."""
    cheap, costly = CostModel(1.0, 0, 0), CostModel(2.0, 0, 0)
    costs = StepCosts(
        launched=AttentionCosts(cheap, costly), replayed=AttentionCosts(costly, cheap)
    )
    table = RowTable(costs=costs)
    table.graphs.captured["layer"] = "{}"
    table.graphs.has_dense_graphs = True
    builder = SimpleNamespace(_table=table, _has_graphs=True, _most_replayed=4)
    parameters = RequestParameters("{}", "f", None, None, is_automatic=True)
    found = [SparseRow(row, row, row + 1, 2000, parameters) for row in range(rows)]
    step = SimpleNamespace(max_query_len=1, num_reqs=rows)
    _, sparse = DeviceMetadataBuilder._settle(builder, step, [], found)
    assert bool(sparse) is in_graph
