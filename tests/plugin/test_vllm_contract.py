"""Every vLLM name and signature that the plugin relies on; the first to fail after an upgrade."""

import dataclasses
import inspect

import pytest
from vllm.platforms import current_platform

from vllm_sparse_plugin import compat


def parameters(function: object) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_installed_version_is_in_the_tested_range() -> None:
    compat.check_vllm_version()


@pytest.mark.parametrize("found", ["0.31.9", "0.33.0", "1.0"])
def test_other_versions_are_refused_with_both_numbers(found: str) -> None:
    with pytest.raises(RuntimeError, match=f"0.32.*found {found}"):
        compat.check_vllm_version(found)


@pytest.mark.parametrize("found", ["0.32.0", "0.32.1+cpu"])
def test_versions_of_the_range_pass(found: str) -> None:
    compat.check_vllm_version(found)


def test_registry_and_selection() -> None:
    from vllm.config import AttentionConfig
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    assert "CUSTOM" in AttentionBackendEnum.__members__
    assert parameters(register_backend)[:2] == ["backend", "class_path"]
    fields = {field.name for field in dataclasses.fields(AttentionConfig)}
    assert {"backend", "backend_per_kind"} <= fields


def test_engine_configuration_fields() -> None:
    from vllm.config import ParallelConfig, VllmConfig

    engine = {field.name for field in dataclasses.fields(VllmConfig)}
    assert {"attention_config", "additional_config", "speculative_config"} <= engine
    assert {"kv_transfer_config", "parallel_config"} <= engine
    parallel = {field.name for field in dataclasses.fields(ParallelConfig)}
    assert {
        "pipeline_parallel_size",
        "decode_context_parallel_size",
        "prefill_context_parallel_size",
    } <= parallel


def test_admission() -> None:
    from vllm.v1.engine.input_processor import InputProcessor

    compat.install()
    source = inspect.getsource(inspect.unwrap(InputProcessor.__init__))
    assert "self.validate_logits_processors_params" in source
    assert parameters(InputProcessor.__init__)[:2] == ["self", "vllm_config"]
    validate = inspect.getsource(InputProcessor._validate_params)
    assert "self.validate_logits_processors_params(params)" in validate


def test_parameters_are_resolved_before_the_request_copies_them() -> None:
    from vllm.v1.engine.input_processor import InputProcessor

    source = inspect.getsource(InputProcessor.process_inputs)
    assert source.index("self._validate_params(") < source.index("params.clone()")


def test_block_hashes() -> None:
    from vllm.v1.core import block_pool, kv_cache_utils

    for module in (kv_cache_utils, block_pool):
        function = inspect.unwrap(module.generate_block_hash_extra_keys)
        assert parameters(function) == [
            "request",
            "start_token_idx",
            "end_token_idx",
            "start_mm_idx",
        ]
    # No other module may call the function by a name of its own.
    hasher = inspect.getsource(kv_cache_utils.get_request_block_hasher)
    assert "generate_block_hash_extra_keys(" in hasher


def test_cpu_platform_is_asked_by_keyword() -> None:
    from vllm.platforms.cpu import CpuPlatform

    compat.install()
    choose = inspect.unwrap(CpuPlatform.__dict__["get_attn_backend_cls"].__func__)
    assert parameters(choose) == ["cls", "selected_backend", "attn_selector_config", "num_heads"]


def test_selector_asks_what_a_backend_validates() -> None:
    from vllm.v1.attention.backend import AttentionBackend
    from vllm.v1.attention.selector import AttentionSelectorConfig

    validated = set(parameters(AttentionBackend.validate_configuration))
    assert set(AttentionSelectorConfig._fields) | {"device_capability"} == validated


def test_processor_interfaces() -> None:
    version_1, version_2 = compat.processor_bases()
    assert version_1 is not version_2
    assert parameters(version_1.update_state) == ["self", "batch_update"]
    assert parameters(version_2.add_request) == ["self", "req_idx", "sampling_params"]
    from vllm_sparse_plugin.row_parameters import RowParametersProcessor

    assert issubclass(RowParametersProcessor, (version_1, version_2))
    assert not inspect.isabstract(RowParametersProcessor)


def test_metadata_fields() -> None:
    from vllm.v1.attention.backend import CommonAttentionMetadata

    fields = {field.name for field in dataclasses.fields(CommonAttentionMetadata)}
    assert {
        "query_start_loc",
        "query_start_loc_cpu",
        "seq_lens",
        "seq_lens_cpu_upper_bound",
        "num_reqs",
        "num_actual_tokens",
        "max_query_len",
        "max_seq_len",
        "block_table_tensor",
        "slot_mapping",
        "positions",
        "is_prefilling",
        "req_idx",
        "_num_computed_tokens_cache",
        "_token_to_req_indices_cache",
    } <= fields


def test_backend_classes() -> None:
    current_platform.import_kernels()
    backend, builder, impl = compat.dense_backend()
    assert parameters(builder.__init__) == [
        "self",
        "kv_cache_spec",
        "layer_names",
        "vllm_config",
        "device",
    ]
    assert parameters(builder.build)[1:] == [
        "common_prefix_len",
        "common_attn_metadata",
        "fast_build",
    ]
    assert parameters(impl.forward)[1:] == [
        "layer",
        "query",
        "key",
        "value",
        "kv_cache",
        "attn_metadata",
        "output",
        "output_scale",
        "output_block_scale",
    ]
    assert backend.forward_includes_kv_cache_update is False
    from vllm_sparse_plugin.backend import SparseAttentionBackend

    assert SparseAttentionBackend.get_name() == "CUSTOM"
    assert not SparseAttentionBackend.is_sparse()
    assert not SparseAttentionBackend.supports_kv_connector()


def test_cuda_reference_backend_has_the_same_shape() -> None:
    """Read, not run: the CUDA classes derive from this backend."""
    from vllm.v1.attention.backends import triton_attn

    assert parameters(triton_attn.TritonAttentionMetadataBuilder.build)[1:] == [
        "common_prefix_len",
        "common_attn_metadata",
        "fast_build",
    ]
    assert parameters(triton_attn.TritonAttentionImpl.forward)[1:8] == [
        "layer",
        "query",
        "key",
        "value",
        "kv_cache",
        "attn_metadata",
        "output",
    ]
    assert triton_attn.TritonAttentionBackend.forward_includes_kv_cache_update is False


def test_endpoint_protocol() -> None:
    from vllm.plugins.endpoint_plugins.interface import EndpointPlugin

    from vllm_sparse_plugin.endpoint import create_endpoint_plugin

    assert isinstance(create_endpoint_plugin(), EndpointPlugin)


def test_worker_base_gets_the_statistics_method() -> None:
    from vllm.v1.worker.worker_base import WorkerBase

    compat.install()
    assert callable(getattr(WorkerBase, compat.STATS_METHOD))


def test_workers_allocate_caches_where_the_plugin_looks() -> None:
    """That it has an effect: tests/e2e/test_long_workload.py."""
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    compat.install()
    names = inspect.signature(WorkerWrapperBase.initialize_from_config).parameters
    assert list(names) == ["self", "kv_cache_configs"]


def test_kill_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_sparse_plugin import plugin

    monkeypatch.setenv(plugin.KILL_SWITCH, "1")
    monkeypatch.setattr(compat, "install", lambda: pytest.fail("installed in spite of the switch"))
    plugin.register()
