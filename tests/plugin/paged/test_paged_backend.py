"""One layer of the backend on mixed batches: each row gets what it gets alone."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from vllm.platforms import current_platform

from sparse_attention_hub.sparse_attention.serialization import config_from_dict, config_to_json
from tests.plugin.paged.paged_rows import SINK_LOCAL, shape_of
from tests.tolerances import ATTENTION_ATOL
from vllm_sparse_plugin import compat
from vllm_sparse_plugin.masked_attention import attend_row, attention_of
from vllm_sparse_plugin.paged.cache_scales import CacheScales
from vllm_sparse_plugin.paged.layout import stored_as
from vllm_sparse_plugin.paged.step import paged_step
from vllm_sparse_plugin.request_parameters import resolve_request
from vllm_sparse_plugin.row_table import Row
from vllm_sparse_plugin.serving_config import ServingConfig
from vllm_sparse_plugin.statistics import Statistics
from vllm_sparse_plugin.step_plan import split_rows

current_platform.import_kernels()

QUEST = [*SINK_LOCAL, {"type": "quest_top_k", "heavy_size": 0.2, "page_size": 8}]
ORACLE = [*SINK_LOCAL, {"type": "oracle_top_k", "heavy_size": 0.1}]
PQ = [*SINK_LOCAL, {"type": "pq_cache", "heavy_size": 8, "pq_sub_dim": 8, "pq_bits": 3}]
PIG = [*SINK_LOCAL, {"type": "magic_pig", "lsh_l": 30, "lsh_k": 5}]
SOCKET = [*SINK_LOCAL, {"type": "socket", "heavy_size": 8, "K": 3, "L": 10}]
OTHER_PAGES = [{"type": "quest_top_k", "heavy_size": 0.2, "page_size": 16}]
SHAPE = shape_of(heads=6, kv_heads=2, head_size=64)
# Name, maskers (None = dense), keys before the step, queries, dense prefix.
ROWS = [
    ("dense decode", None, 120, 1, 0),
    ("quest decode", QUEST, 150, 1, 0),
    ("quest decode, short", QUEST, 0, 1, 0),
    ("dense prefill", None, 30, 50, 0),
    ("oracle chunk after a dense prefix", ORACLE, 40, 30, 60),
    ("quest chunk", QUEST, 61, 7, 0),
    ("socket, general path", SOCKET, 90, 1, 0),
    ("quest without an index, general path", OTHER_PAGES, 90, 3, 0),
    ("dense last layer", QUEST, 50, 1, 0),
    ("dense last layer, chunk", QUEST, 20, 30, 0),
    ("pq decode", PQ, 140, 1, 0),
    ("pq chunk", PQ, 120, 20, 125),
    ("magic pig decode", PIG, 99, 1, 0),
    ("magic pig chunk", PIG, 0, 35, 0),
]
LAYER, LAYERS = 3, 4


def config_of(name: str, maskers: list[dict] | None) -> dict:
    dense = {"dense_layers": [LAYER]} if name.startswith("dense last layer") else {}
    return {"maskers": maskers or [], **dense}


@pytest.fixture
def impl(monkeypatch: pytest.MonkeyPatch):
    """A layer as an engine makes it: Quest on pages of 8, and for requests, two maskers more."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.v1.attention.backends import cpu_attn
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from vllm_sparse_plugin.paged_backend import PagedAttentionImpl

    monkeypatch.setattr(cpu_attn, "should_use_zentorch_sdpa", lambda *arguments: False)
    config = VllmConfig()
    monkeypatch.setattr(config, "model_config", SimpleNamespace(dtype=torch.float32))
    config.attention_config.backend = AttentionBackendEnum.CUSTOM
    config.additional_config = {"sparse_attention": {"maskers": QUEST, "index": [PQ[-1], PIG[-1]]}}
    with set_current_vllm_config(config):
        yield PagedAttentionImpl(
            num_heads=6,
            head_size=64,
            scale=0.125,
            num_kv_heads=2,
            alibi_slopes=None,
            sliding_window=None,
            kv_cache_dtype="auto",
        )


def row_of(name: str, maskers: list[dict] | None, prefix: int) -> Row | None:
    if maskers is None:
        return None
    server = ServingConfig(config_from_dict(config_of(name, maskers)))
    given = {"sparse_attention_dense_prefix": prefix, "sparse_attention_tag": name.split(",")[0]}
    given["sparse_attention_tag"] = name.replace(" ", "_").replace(",", "")
    return Row(resolve_request(given, server)["sparse_attention_resolved"], prefix, prefix)


def expected(name, maskers, query, key, value, before: int, prefix: int, sinks):
    """Row by row: leading queries dense, the others by the general path."""
    outputs = []
    num_dense = len(query) if maskers is None else min(max(prefix - before, 0), len(query))
    layout = [({"maskers": [{"type": "sink", "sink_size": 1.0}]}, slice(0, num_dense))]
    if maskers is not None:
        layout.append((config_of(name, maskers), slice(num_dense, len(query))))
    for config, part in layout:
        if part.start == part.stop:
            continue
        if config.get("dense_layers"):
            config = layout[0][0]
        last = before + part.stop
        result = attend_row(
            attention_of(config_to_json(config_from_dict(config))),
            query[part],
            key[None, :, :last],
            value[None, :, :last],
            0.125,
            LAYER,
            sinks,
        )
        outputs.append(result)
    return torch.cat([result.output for result in outputs]), outputs[-1]


@pytest.mark.parametrize(
    ("order", "has_sinks", "has_eight_bits"),
    [
        (list(range(len(ROWS))), False, False),
        ([8, 13, 3, 1, 5, 10, 0, 12, 7, 9, 2, 11, 6, 4], True, False),
        ([8, 13, 3, 1, 5, 10, 0, 12, 7, 9, 2, 11, 6, 4], True, True),
        *[([row], False, False) for row in (1, 3, 11, 13)],
    ],
)
def test_mixed_batch(impl, order: list[int], has_sinks: bool, has_eight_bits: bool) -> None:
    """Learned sinks are of a layer, and so of all its rows; so is what its cache holds."""
    impl.sinks = torch.linspace(-2, 4, 6) if has_sinks else None
    generator = torch.Generator().manual_seed(len(order))
    layer = SimpleNamespace(
        layer_name=f"model.layers.{LAYER}.self_attn.attn",
        isa="vec",
        _k_scale_float=0.5,
        _v_scale_float=0.03,
    )
    from vllm_sparse_plugin.paged_backend import block_layout

    stored = torch.float8_e4m3fn if has_eight_bits else torch.float32
    layout = block_layout(impl._config, replace(SHAPE, dtype=stored))
    size = (90, 2, 32, layout.bytes_per_token // stored.itemsize)
    kv_cache = torch.full(size, torch.nan, dtype=stored)
    if has_eight_bits:
        kv_cache = kv_cache.view(torch.uint8)  # as vLLM makes it
    blocks = torch.randperm(90, generator=generator).tolist()
    table = torch.full((len(order), 8), 10_000, dtype=torch.int32)
    starts, seq_lens, rows, wanted = [0], [], {}, []
    queries, slots, new_keys, new_values = [], [], [], []
    for place, index in enumerate(order):
        name, maskers, before, count, prefix = ROWS[index]
        total = before + count
        needed = -(-total // 32)
        table[place, :needed] = torch.tensor([blocks.pop() for _ in range(needed)])
        # Small integers, so that no near tie falls either way.
        key = torch.randint(-4, 5, (total, 2, 64), generator=generator).float()
        value = torch.randn(total, 2, 64, generator=generator)
        if has_eight_bits:  # else the reference would have others
            value = stored_as(value, stored, 0.03).float() * 0.03
        query = torch.randint(-2, 3, (count, 6, 64), generator=generator).float()
        position = torch.arange(total)
        slot = table[place][position // 32].long() * 32 + position % 32
        impl.do_kv_cache_update(layer, key[:before], value[:before], kv_cache, slot[:before])
        new_keys.append(key[before:])
        new_values.append(value[before:])
        slots.append(slot[before:])
        queries.append(query)
        starts.append(starts[-1] + count)
        seq_lens.append(total)
        row = row_of(name, maskers, prefix)
        if row is not None:
            rows[place] = row
        wanted.append(
            expected(
                name,
                maskers,
                query,
                key.transpose(0, 1),
                value.transpose(0, 1),
                before,
                prefix,
                impl.sinks,
            )
        )
    impl.do_kv_cache_update(
        layer, torch.cat(new_keys), torch.cat(new_values), kv_cache, torch.cat(slots)
    )
    dense, sparse = split_rows(starts, seq_lens, rows)
    step = paged_step(dense, sparse, table)
    query = torch.cat(queries)
    output = torch.full((len(query), 6 * 64), torch.nan)
    impl.forward(layer, query, query, query, kv_cache, step, output)
    statistics = Statistics(pending={1: [group.counts for group in step.sparse]})
    for place, index in enumerate(order):
        name, maskers, *_ = ROWS[index]
        output_of_row, last = wanted[place]
        found = output[starts[place] : starts[place + 1]].view(-1, 6, 64)
        assert (found - output_of_row).abs().max() <= ATTENTION_ATOL[torch.float32], name
        if maskers is not None:
            report = statistics.report(rows[place].parameters.tag)
            assert report["read_keys"] == last.read_keys, name
            assert report["visible_keys"] == last.visible_keys, name
            assert (report["general_rows"] == 1) == ("general path" in name), name
            assert report["read_bytes"] > 0


def test_a_cache_of_bytes_has_the_scales_that_the_model_was_loaded_with(impl) -> None:
    from vllm_sparse_plugin.paged_backend import block_layout

    layout = block_layout(impl._config, replace(SHAPE, dtype=torch.float8_e4m3fn))
    kv_cache = torch.zeros(3, 2, 32, layout.bytes_per_token, dtype=torch.uint8)
    layer = SimpleNamespace(
        layer_name="model.layers.0.attn", _k_scale_float=1.0, _v_scale_float=1.0
    )
    assert impl._cache(layer, kv_cache).scales == CacheScales(1.0, 1.0)
    layer._k_scale_float, layer._v_scale_float = 0.5, 2.0
    cache = impl._cache(layer, kv_cache)
    assert cache.scales == CacheScales(0.5, 2.0)
    assert impl._cache(layer, kv_cache) is cache


def test_the_log_says_what_held_the_fast_path_back(impl, caplog) -> None:
    from vllm_sparse_plugin.paged import served
    from vllm_sparse_plugin.paged_backend import block_layout

    layout = block_layout(impl._config, SHAPE)
    for maskers, reason in ((SOCKET, "socket has no paged counterpart"), (OTHER_PAGES, "hold no")):
        config = config_to_json(config_from_dict({"maskers": [*maskers, SINK_LOCAL[0]]}))
        served.say_once.cache_clear()
        for layer in range(3):
            assert served.paged_attention_of(config, layout, layer + 20) is None
        said = [record.getMessage() for record in caplog.records if reason in record.getMessage()]
        assert len(said) == 1
        assert json.dumps(json.loads(config)["maskers"][0]["type"]) in said[0]


def test_one_masker_without_an_index_takes_none_from_the_others(caplog) -> None:
    from vllm_sparse_plugin.paged_backend import block_layout

    index = [SOCKET[-1], OTHER_PAGES[0], {**OTHER_PAGES[0], "page_size": 24}]
    config = ServingConfig.parse({"maskers": QUEST, "index": index})
    layout = block_layout(config, shape_of(head_size=40))
    assert [bounds.page_size for bounds in layout.indices] == [8, 16]
    for reason in ("socket has no paged counterpart", "page_size 24 does not divide"):
        assert reason in caplog.text


def test_room_is_made_in_vllms_own_accounting(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    from vllm_sparse_plugin.paged_backend import PagedAttentionBackend, block_layout

    engine = SimpleNamespace()
    config = ServingConfig.parse({"maskers": QUEST, "index": OTHER_PAGES})
    monkeypatch.setattr(compat, "engine_being_built", lambda: engine)
    monkeypatch.setattr(compat, "serving_config", lambda engine: config)
    monkeypatch.setattr(
        compat.engine, "attention_shape", lambda engine: SimpleNamespace(num_heads=9)
    )
    monkeypatch.setattr(compat, "implementations", lambda engine: {})
    spec = FullAttentionSpec(block_size=128, num_kv_heads=3, head_size=64, dtype=torch.float32)
    made = PagedAttentionBackend.customize_spec(spec)
    # Two rows of 64 float32 per page of 8, and of 16.
    index = 2 * 64 * 4 // 8 + 2 * 64 * 4 // 16
    assert made.state_content_size_bytes == 2 * 64 * 4 + index
    assert made.page_size_bytes == 128 * 3 * (2 * 64 * 4 + index)
    assert PagedAttentionBackend.customize_spec(made) == made
    # Blocks that vLLM has enlarged or padded afterwards, for layers with larger caches.
    layout = block_layout(config, compat.block_shape(made, engine))
    compat.check_blocks(made, layout)
    enlarged = replace(made, block_size=256)
    compat.check_blocks(enlarged, block_layout(config, compat.block_shape(enlarged, engine)))
    for changed in (replace(made, page_size_padded=1 << 20), replace(made, state_content_bytes=99)):
        with pytest.raises(ValueError, match="layers of this model have KV caches of different"):
            compat.check_blocks(changed, layout)


@pytest.mark.parametrize(
    ("masker", "serves"),
    [
        ({"type": "quest_top_k", "heavy_size": 8, "page_size": 8}, True),
        ({"type": "oracle_top_k", "heavy_size": 8}, True),
        ({"type": "pq_cache", "heavy_size": 8, "pq_sub_dim": 8, "pq_bits": 2}, False),
    ],
)
def test_blocks_of_another_layer(masker: dict, serves: bool, caplog) -> None:
    """What they say of the keys alone, they say for whoever reads them."""
    from vllm_sparse_plugin.paged import served
    from vllm_sparse_plugin.paged_backend import block_layout

    config = ServingConfig.parse({"maskers": [masker]})
    layout = block_layout(config, SHAPE)
    config_json = config_to_json(config.attention)
    served.say_once.cache_clear()
    assert served.paged_attention_of(config_json, layout, 31) is not None
    shared = served.paged_attention_of(config_json, layout, 31, is_shared=True)
    assert (shared is not None) == serves
    assert ("a layer reads another one's blocks" in caplog.text) != serves


def test_room_beside_layers_with_a_window(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

    from vllm_sparse_plugin.paged_backend import PagedAttentionBackend, PagedAttentionImpl

    engine = SimpleNamespace(
        model_config=SimpleNamespace(hf_text_config=SimpleNamespace(), max_model_len=512)
    )
    config = ServingConfig.parse({"maskers": [{**QUEST[-1], "page_size": 2, "label_bits": 4}]})

    def layer(head_size: int, can_be_sparse: bool, shares: str | None = None) -> PagedAttentionImpl:
        made = object.__new__(PagedAttentionImpl)
        made.num_kv_heads, made.head_size, made.can_be_sparse = 2, head_size, can_be_sparse
        made.kv_sharing_target_layer_name = shares
        return made

    layers = {"windowed": layer(32, False), "whole": layer(64, True)}
    monkeypatch.setattr(compat, "engine_being_built", lambda: engine)
    monkeypatch.setattr(compat, "serving_config", lambda engine: config)
    monkeypatch.setattr(
        compat.engine, "attention_shape", lambda engine: SimpleNamespace(num_heads=4)
    )
    monkeypatch.setattr(compat, "implementations", lambda engine: layers)
    make, common = PagedAttentionBackend.customize_spec, {"num_kv_heads": 2, "dtype": torch.float32}
    whole = FullAttentionSpec(block_size=128, head_size=64, **common)
    windowed = SlidingWindowSpec(block_size=128, head_size=32, sliding_window=16, **common)
    assert make(whole).page_size_bytes == 2 * make(windowed).page_size_bytes
    # 64 numbers of 4 bits and 16 bytes for 2 tokens; a window needs none.
    assert make(whole).state_content_bytes == 512 + 40
    assert make(windowed).state_content_bytes == (512 + 40) // 2
    # A window as long as the model's sequences is none.
    long = SlidingWindowSpec(block_size=128, head_size=64, sliding_window=512, **common)
    assert make(long).state_content_bytes == make(whole).state_content_bytes
    # What reads another layer's cache takes nothing; without windows there is nothing to equal.
    layers["sharing"] = layer(48, True, "whole")
    both = make(whole).state_content_bytes
    del layers["windowed"], layers["sharing"]
    assert make(whole).state_content_bytes <= both
    layers["windowed"] = layer(48, False)
    with pytest.raises(ValueError, match="layers with a window have caches of another size"):
        make(whole)


@pytest.mark.parametrize("can_be_sparse", [True, False])
def test_layers_that_share_keys_store_them_in_the_same_order(can_be_sparse: bool) -> None:
    from vllm_sparse_plugin.paged_backend import check_shared_caches

    def layer(can_be_sparse: bool, target: str | None) -> SimpleNamespace:
        impl = SimpleNamespace(can_be_sparse=can_be_sparse)
        return SimpleNamespace(impl=impl, kv_sharing_target_layer_name=target)

    layers = {"first": layer(True, None), "windowed": layer(False, None)}
    check_shared_caches({**layers, "last": layer(True, "first")})
    check_shared_caches({**layers, "last": layer(False, "windowed")})
    other = "windowed" if can_be_sparse else "first"
    with pytest.raises(ValueError, match=f"cannot share keys, as last does with {other}"):
        check_shared_caches({**layers, "last": layer(can_be_sparse, other)})
