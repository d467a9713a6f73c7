"""Layer by layer: the plugin on vLLM's paged cache and the reference, on the same real Q, K, V.

When served and reference answers part, this says which layer does it: no other part of either
side is in the way. A decode step and a sparse prefill chunk of the real model, each of its layers.
"""

from types import SimpleNamespace

import pytest
import torch
from vllm.platforms import current_platform

from sparse_attention_hub.adapters.attention_observation import LayerInputs
from sparse_attention_hub.sparse_attention.research_attention import ResearchAttention
from sparse_attention_hub.sparse_attention.serialization import config_from_dict
from tests.captured_attention import captured_layers
from tests.e2e.texts import prompt
from tests.tolerances import ATTENTION_ATOL
from vllm_sparse_plugin import compat
from vllm_sparse_plugin.backend import SparseAttentionImpl
from vllm_sparse_plugin.request_parameters import resolve_request
from vllm_sparse_plugin.row_table import Row
from vllm_sparse_plugin.serving_config import ServingConfig
from vllm_sparse_plugin.step_plan import StepPlan, split_rows

current_platform.import_kernels()

CONTEXT, BLOCK_SIZE, LAYERS = 300, 128, 30
SINK_LOCAL = [{"type": "sink", "sink_size": 4}, {"type": "local", "window_size": 24}]
CONFIGS = {
    "dense": [{"type": "sink", "sink_size": 1.0}],
    "sink-local": SINK_LOCAL,
    "oracle-count": [*SINK_LOCAL, {"type": "oracle_top_k", "heavy_size": 32}],
    "oracle-share": [*SINK_LOCAL, {"type": "oracle_top_k", "heavy_size": 0.05}],
    "pq": [*SINK_LOCAL, {"type": "pq_cache", "heavy_size": 32, "pq_sub_dim": 16, "pq_bits": 4}],
    "magic-pig": [*SINK_LOCAL, {"type": "magic_pig", "lsh_l": 20, "lsh_k": 6}],
}


@pytest.fixture(scope="module")
def layer_calls(model_path: str) -> list[LayerInputs]:
    """Each layer's queries, keys and values in one pass of the real model in float32."""
    calls = captured_layers(model_path, prompt(model_path, 400, CONTEXT))
    assert len(calls) == LAYERS
    return calls


def paged(call: LayerInputs, isa: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A cache with the call's keys and values in scattered blocks, and the block table."""
    _, kv_heads, num_keys, head_size = call.key.shape
    num_blocks = -(-num_keys // BLOCK_SIZE)
    cache = torch.full((num_blocks + 2, kv_heads, BLOCK_SIZE, 2 * head_size), torch.nan)
    table = torch.tensor([4, 0, 2], dtype=torch.int32)[:num_blocks]
    position = torch.arange(num_keys)
    slots = table[position // BLOCK_SIZE].long() * BLOCK_SIZE + position % BLOCK_SIZE
    halves = cache.view(cache.shape[0], kv_heads, 2 * BLOCK_SIZE, head_size).chunk(2, dim=2)
    key, value = (tensor[0].transpose(0, 1).contiguous() for tensor in (call.key, call.value))
    compat.cpu_write_key_value(key, value, *halves, slots, isa)
    return cache, table[None]


def served(impl, maskers: list[dict], call: LayerInputs, index: int, queries: int) -> torch.Tensor:
    """The call's last queries through the plugin's own layer."""
    server = ServingConfig.parse({"maskers": maskers})
    resolved = resolve_request({"sparse_attention_dense_prefix": 0}, server)
    parameters = resolved["sparse_attention_resolved"]
    query = call.query[0, :, -queries:].transpose(0, 1).contiguous()
    dense, sparse = split_rows([0, queries], [CONTEXT], {0: Row(parameters, 0, 0)})
    assert not dense
    isa = "vec"
    cache, table = paged(call, isa)
    plan = StepPlan(tuple(sparse), table, torch.empty(0, dtype=torch.long), None)
    output = torch.full((queries, *query.shape[1:]), torch.nan)
    return impl.forward(
        SimpleNamespace(layer_name=f"model.layers.{index}.self_attn.attn", isa=isa),
        query,
        query[:, :0],  # already in the cache
        query[:, :0],
        cache,
        SimpleNamespace(sparse_plan=plan),
        output,
    )


def reference(
    maskers: list[dict],
    call: LayerInputs,
    index: int,
    queries: int,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """The same queries through `ResearchAttention`, with an additive causal mask."""
    attention = ResearchAttention.create_from_config(config_from_dict({"maskers": maskers}))
    position = torch.arange(CONTEXT)
    mask = torch.where(position[None] > position[-queries:, None], torch.finfo().min, 0.0)
    output, _ = attention.custom_attention(
        None,
        call.query[:, :, -queries:],
        call.key,
        call.value,
        mask[None, None],
        call.scaling,
        0.0,
        {},
        layer_idx=index,
        s_aux=sinks,
    )
    return output[0]


@pytest.fixture
def impl(monkeypatch: pytest.MonkeyPatch, layer_calls):
    """The plugin's layer for the model's shape, outside an engine."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.v1.attention.backends import cpu_attn

    # It asks for the engine's dtype, which needs a whole model configuration.
    monkeypatch.setattr(cpu_attn, "should_use_zentorch_sdpa", lambda *arguments: False)
    config = VllmConfig()
    monkeypatch.setattr(config, "model_config", SimpleNamespace(dtype=torch.float32))
    call = layer_calls[0]
    with set_current_vllm_config(config):
        yield SparseAttentionImpl(
            num_heads=call.query.shape[1],
            head_size=call.query.shape[-1],
            scale=call.scaling,
            num_kv_heads=call.key.shape[1],
            alibi_slopes=None,
            sliding_window=None,
            kv_cache_dtype="auto",
        )


@pytest.mark.parametrize("queries", [1, 40])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_layer_of_the_real_model(name: str, queries: int, impl, layer_calls) -> None:
    errors = [
        (
            served(impl, CONFIGS[name], call, index, queries)
            - reference(CONFIGS[name], call, index, queries)
        )
        .abs()
        .max()
        .item()
        for index, call in enumerate(layer_calls)
    ]
    # Not `max(errors)`, which may skip a NaN.
    assert all(error <= ATTENTION_ATOL[torch.float32] for error in errors), errors


@pytest.mark.parametrize("queries", [1, 40])
def test_learned_sinks(queries: int, impl, layer_calls) -> None:
    call, maskers = layer_calls[0], CONFIGS["oracle-count"]
    without = reference(maskers, call, 0, queries)
    impl.sinks = torch.linspace(-2, 4, call.query.shape[1])
    expected = reference(maskers, call, 0, queries, impl.sinks)
    assert (expected - without).abs().max() > 100 * ATTENTION_ATOL[torch.float32]
    found = served(impl, maskers, call, 0, queries)
    assert (found - expected).abs().max() <= ATTENTION_ATOL[torch.float32]


@pytest.mark.parametrize("queries", [1, 40])
def test_dense_maskers_give_the_models_own_attention(queries: int, impl, layer_calls) -> None:
    """Against torch's kernel, so that both sides cannot share a mistake."""
    for index, call in enumerate(layer_calls):
        position = torch.arange(CONTEXT)
        expected = torch.nn.functional.scaled_dot_product_attention(
            call.query[:, :, -queries:],
            call.key,
            call.value,
            attn_mask=position[None] <= position[-queries:, None],
            scale=call.scaling,
            enable_gqa=True,
        )[0].transpose(0, 1)
        found = served(impl, CONFIGS["dense"], call, index, queries)
        assert (found - expected).abs().max() <= ATTENTION_ATOL[torch.float32], index
