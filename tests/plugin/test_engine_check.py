"""Engine options that the plugin refuses at start-up, all in one message."""

import importlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sparse_attention_hub.sparse_attention.research_attention import ResearchAttentionConfig
from sparse_attention_hub.sparse_attention.research_attention.maskers.fixed import (
    SinkMaskerConfig,
)
from vllm_sparse_plugin import compat
from vllm_sparse_plugin.backend import SparseAttentionBackend
from vllm_sparse_plugin.compat import hooks
from vllm_sparse_plugin.named_layers import say_without_effect
from vllm_sparse_plugin.paged_backend import PagedAttentionBackend
from vllm_sparse_plugin.serving_config import ServingConfig

PARALLEL = (
    "pipeline_parallel_size",
    "decode_context_parallel_size",
    "prefill_context_parallel_size",
)


def test_on_cuda_each_step_decides_about_queries_of_enough_keys(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("vllm.platforms.current_platform", SimpleNamespace(is_cuda=lambda: True))
    sink = {"maskers": [{"type": "sink", "sink_size": 4}]}
    for options, expected in (
        ({}, 1024),
        ({"min_sparse_keys": 5}, 0),
        ({"fast_path": False}, 0),
        ({"maskers": []}, 0),
    ):
        config = ServingConfig.parse({**sink, **options})
        assert hooks._break_even(None, config) == expected
        assert hooks.decides_per_step(config) is (expected > 0)


def engine(**changes: Any) -> Any:
    """An engine's configuration as `check_engine` reads it; names are held by the contract test."""
    options = {**dict.fromkeys(PARALLEL, 1), "cache_dtype": "auto"} | changes
    return SimpleNamespace(
        speculative_config=options.get("speculative_config"),
        use_v2_model_runner=options.get("use_v2_model_runner", False),
        kv_transfer_config=options.get("kv_transfer_config"),
        cache_config=SimpleNamespace(
            cache_dtype=options["cache_dtype"],
            kv_sharing_fast_prefill=options.get("kv_sharing_fast_prefill", False),
            kv_cache_dtype_skip_layers=options.get("kv_cache_dtype_skip_layers", []),
        ),
        model_config=SimpleNamespace(
            dtype=torch.bfloat16,
            attention_chunk_size=options.get("attention_chunk_size"),
            enable_prompt_embeds=options.get("enable_prompt_embeds", False),
        ),
        parallel_config=SimpleNamespace(
            **{name: options[name] for name in PARALLEL},
            use_ubatching=options.get("use_ubatching", False),
        ),
    )


@pytest.fixture(autouse=True)
def _has_avx512(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever runs the tests: vLLM has no caches of 8 bits elsewhere."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: True)


@pytest.mark.parametrize("cache_dtype", ["auto", "bfloat16", "fp8", "fp8_e4m3"])
def test_a_plain_engine_passes(cache_dtype: str) -> None:
    compat.check_engine(engine(cache_dtype=cache_dtype))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"speculative_config": object()}, "speculative decoding"),
        ({"kv_transfer_config": object()}, "a KV connector"),
        ({"pipeline_parallel_size": 2}, "pipeline parallelism"),
        ({"decode_context_parallel_size": 2}, "decode context parallelism"),
        ({"prefill_context_parallel_size": 2}, "prefill context parallelism"),
        ({"cache_dtype": "fp8_e5m2"}, "--kv-cache-dtype fp8_e5m2 .allowed: auto, the model's own"),
        ({"cache_dtype": "float16"}, "--kv-cache-dtype float16 .allowed: auto, the model's own"),
        (
            {"cache_dtype": "fp8", "kv_cache_dtype_skip_layers": ["0"]},
            "--kv-cache-dtype-skip-layers",
        ),
        ({"attention_chunk_size": 8192}, "chunked local attention"),
        ({"kv_sharing_fast_prefill": True}, "--kv-sharing-fast-prefill"),
        ({"enable_prompt_embeds": True}, "prompt embeddings"),
        ({"use_ubatching": True}, "microbatches"),
    ],
)
def test_refused_with_the_reason(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"does not support: {message}"):
        compat.check_engine(engine(**changes))


def test_eight_bits_where_they_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    small = engine(cache_dtype="fp8")
    with pytest.raises(ValueError, match='--kv-cache-dtype fp8 beside "fast_path": false on CPUs'):
        compat.check_engine(small, has_fast_path=False)
    assert not SparseAttentionBackend.supports_per_head_quant_scales()
    module = importlib.import_module("vllm_sparse_plugin.compat.engine_checks")
    # What a checkpoint says of its layers is known later than the engine's options.
    monkeypatch.setattr(module, "serving_config", lambda config: SimpleNamespace(fast_path=False))
    with pytest.raises(ValueError, match='--kv-cache-dtype fp8 beside "fast_path": false on CPUs'):
        compat.check_cache("fp8", small)
    monkeypatch.setattr(module, "serving_config", lambda config: SimpleNamespace(fast_path=True))
    compat.check_cache("fp8", small)
    compat.check_cache("auto", engine())
    with pytest.raises(ValueError, match="does not support: layers with caches of different types"):
        compat.check_cache("auto", small)
    monkeypatch.setattr(module, "device_type", lambda: "cuda")
    for name in ("FLASH_ATTN", "TRITON_ATTN"):
        backend = SimpleNamespace(get_name=lambda name=name: name)
        monkeypatch.setattr(module, "dense_backend", lambda backend=backend: (backend, None, None))
        if name == "TRITON_ATTN":
            compat.check_engine(small, has_fast_path=False)
            compat.check_cache("fp8", small)
            continue
        for check in (compat.check_engine, lambda config: compat.check_cache("fp8", config)):
            with pytest.raises(ValueError, match="beside FlashAttention, .*=TRITON_ATTN serves it"):
                check(small)


def test_eight_bits_on_cpus_for_which_vllm_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_is_avx512_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False)
    module = importlib.import_module("vllm_sparse_plugin.compat.engine_checks")
    monkeypatch.setattr(module, "serving_config", lambda config: SimpleNamespace(fast_path=True))
    compat.check_engine(engine(cache_dtype="bfloat16"))
    small = engine(cache_dtype="fp8")
    for check in (compat.check_engine, lambda config: compat.check_cache("fp8", config)):
        with pytest.raises(ValueError, match="--kv-cache-dtype fp8 here: .* requires .*AVX-512"):
            check(small)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("auto", torch.bfloat16), ("bfloat16", torch.bfloat16), ("fp8", torch.float8_e4m3fn)],
)
def test_what_caches_hold(name: str, expected: torch.dtype) -> None:
    assert hooks.cache_dtype(engine(cache_dtype=name)) == expected


def test_all_reasons_at_once() -> None:
    with pytest.raises(ValueError, match="speculative decoding.*; pipeline parallelism"):
        compat.check_engine(engine(speculative_config=object(), pipeline_parallel_size=2))


@pytest.mark.parametrize(
    ("module", "function", "arguments"),
    [
        # Whose steps are not causal, or begin with keys of no token.
        ("encoder_only_attention", "create_encoder_only_attention_backend", ()),
        ("static_sink_attention", "create_static_sink_attention_backend", (128,)),
    ],
)
def test_layers_that_would_be_shown_another_step_are_refused(module, function, arguments) -> None:
    home = importlib.import_module(f"vllm.model_executor.layers.attention.{module}")
    create = getattr(home, function)
    for backend in (SparseAttentionBackend, PagedAttentionBackend):
        with pytest.raises(ValueError, match="some of its layers want a .*AttentionBuilder"):
            create(backend, *arguments)


def test_learned_sinks_are_served_where_the_dense_kernel_has_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert SparseAttentionBackend.supports_sink()  # on CPUs, whose backend does not say so
    dense = SparseAttentionBackend.__mro__[1]
    monkeypatch.setattr(compat, "device_type", lambda: "cuda")
    for has_them in (False, True):
        monkeypatch.setattr(dense, "supports_sink", lambda has_them=has_them: has_them)
        assert SparseAttentionBackend.supports_sink() is has_them


def test_layers_that_are_named_in_vain_are_said(caplog: pytest.LogCaptureFixture) -> None:
    own, window = SimpleNamespace(can_be_sparse=True), SimpleNamespace(can_be_sparse=False)
    implementations = {0: own, 1: window, 3: object()}  # the last one's backend is another
    layers = {
        f"model.layers.{index}.attn": SimpleNamespace(impl=impl)
        for index, impl in implementations.items()
    }
    maskers = [SinkMaskerConfig(4)]
    fine = ResearchAttentionConfig(maskers, (1, 3), {0: maskers})
    say_without_effect(fine, layers)
    assert not caplog.messages
    for config, said in (
        (ResearchAttentionConfig(maskers, (0, 2)), "layers 2, and"),
        (ResearchAttentionConfig(maskers, (), {1: maskers, 3: maskers}), "layers 1, 3, and"),
    ):
        caplog.clear()
        say_without_effect(config, layers)
        [message] = caplog.messages
        assert said in message
        assert "can be sparse in layers 0" in message


def test_a_model_without_the_plugins_layers_is_refused() -> None:
    own = SimpleNamespace(impl=SimpleNamespace(can_be_sparse=False))
    others = {"recurrent": SimpleNamespace(), "another backend's": SimpleNamespace(impl=object())}
    hooks.require_own_layers({**others, "own": own})
    for layers in (others, {}):
        with pytest.raises(ValueError, match="has no attention layers, or has them choose"):
            hooks.require_own_layers(layers)


def test_it_is_looked_at_when_there_are_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    monkeypatch.setattr(WorkerWrapperBase, "initialize_from_config", lambda self: None)
    monkeypatch.setattr(hooks, "is_selected", lambda config: config.is_selected)
    monkeypatch.setattr(hooks, "_run_dummy_steps", lambda config: None)
    hooks._hook_cache_allocation()
    for is_selected in (False, True):
        config = SimpleNamespace(
            is_selected=is_selected,
            compilation_config=SimpleNamespace(static_forward_context={"a": SimpleNamespace()}),
        )
        worker = SimpleNamespace(vllm_config=config)
        if is_selected:
            with pytest.raises(ValueError, match="has no attention layers"):
                WorkerWrapperBase.initialize_from_config(worker)
        else:
            WorkerWrapperBase.initialize_from_config(worker)


@pytest.mark.parametrize(("keys", "says"), [(2000, False), (2049, True), (hooks.NEVER, False)])
def test_sequences_too_short_for_maskers_are_said(
    keys: int, says: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """(That maskers never pay is said by who measures it.)"""
    monkeypatch.setattr("vllm.platforms.current_platform", SimpleNamespace(is_cuda=lambda: False))
    monkeypatch.setattr(hooks, "break_even_of", lambda *arguments: keys)
    for name in ("attention_shape", "cache_dtype", "served_block_size"):
        monkeypatch.setattr(hooks, name, lambda config: None)
    config = ServingConfig.parse({"maskers": [{"type": "sink", "sink_size": 4}]})
    model = SimpleNamespace(dtype=torch.float32, max_model_len=2048)
    assert hooks._break_even(SimpleNamespace(model_config=model), config) == keys
    assert ("no sequence here is long enough" in caplog.text) is says
