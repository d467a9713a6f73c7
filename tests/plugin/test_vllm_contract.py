"""That the plugin fits the installed vLLM as it is loaded.

Names and signatures of vLLM, in the sources of each version: `test_vllm_symbols.py`.
"""

import inspect
import logging
from types import SimpleNamespace

import pytest
from vllm.platforms import current_platform

from tests.plugin import vllm_symbols
from vllm_sparse_plugin import compat, plugin
from vllm_sparse_plugin.compat.engine import served_block_size
from vllm_sparse_plugin.endpoint import SparseAttentionEndpoint, create_endpoint_plugin
from vllm_sparse_plugin.plugin_log import log_as_vllm
from vllm_sparse_plugin.row_parameters import RowParametersProcessor


def test_installed_version_is_in_the_tested_range() -> None:
    compat.check_vllm_version()


@pytest.mark.parametrize("found", ["0.31.9", "0.34.0rc1", "0.34.0", "1.0"])
def test_other_versions_are_refused_with_all_numbers_and_what_to_do(found: str) -> None:
    message = f"0.32 and 0.33, found vLLM {found}: install .* set {plugin.KILL_SWITCH}=1"
    with pytest.raises(RuntimeError, match=message):
        compat.check_vllm_version(found)


@pytest.mark.parametrize("found", ["0.32.0", "0.32.1+cpu", "0.33.0", "0.33.1"])
def test_versions_of_the_range_pass(found: str) -> None:
    compat.check_vllm_version(found)


def test_functions_that_others_import_by_name_are_replaced_everywhere() -> None:
    from vllm.v1.core import block_pool, kv_cache_utils

    compat.install()
    for module in (block_pool, kv_cache_utils):
        function = module.generate_block_hash_extra_keys
        assert inspect.unwrap(function) is not function


def test_cpu_platform_is_asked_by_keyword() -> None:
    from vllm.platforms.cpu import CpuPlatform

    compat.install()
    names = list(inspect.signature(CpuPlatform.get_attn_backend_cls).parameters)
    assert names == ["selected_backend", "attn_selector_config", "num_heads"]


def implementations() -> list[tuple[str, type]]:
    """The places of the table whose methods are the plugin's, with the classes that have them."""
    current_platform.import_kernels()
    from vllm_sparse_plugin import backend, paged_backend

    of_base = {
        "AttentionBackend": [backend.SparseAttentionBackend, paged_backend.PagedAttentionBackend],
        "AttentionImpl": [backend.SparseAttentionImpl, paged_backend.PagedAttentionImpl],
        "AttentionMetadataBuilder": [
            backend.SparseAttentionMetadataBuilder,
            paged_backend.PagedMetadataBuilder,
        ],
        "CPUAttentionBackendImpl": [paged_backend.PagedAttentionImpl],
        "EndpointPlugin": [SparseAttentionEndpoint],
        "LogitsProcessor": [RowParametersProcessor],
    }
    return [
        (place, implementation)
        for place in vllm_symbols.REPLACED
        for implementation in of_base.get(place.partition(":")[2].partition(".")[0], [])
    ]


def test_the_plugins_methods_take_what_vllm_passes() -> None:
    for place, implementation in implementations():
        method = inspect.signature(getattr(implementation, place.rpartition(".")[2]))
        passed = [name for name in vllm_symbols.REPLACED[place].split(", ") if name]
        if passed[:1] == ["cls"]:  # bound
            passed = passed[1:]
        bound = method.bind(*passed)  # each argument is its own name
        for name, value in bound.arguments.items():
            is_one = method.parameters[name].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
            assert not is_one or name == value, f"{implementation.__name__}, {place}"


def test_the_processor_serves_both_runners() -> None:
    version_1, version_2 = compat.processor_bases()
    assert version_1 is not version_2
    assert issubclass(RowParametersProcessor, version_1)
    assert issubclass(RowParametersProcessor, version_2)
    assert not inspect.isabstract(RowParametersProcessor)


def test_the_plugin_s_log_goes_where_vllm_s_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    own, vllm = logging.getLogger("vllm_sparse_plugin"), logging.getLogger("vllm")
    handler = logging.NullHandler()
    monkeypatch.setattr(vllm, "handlers", [handler])
    monkeypatch.setattr(vllm, "level", logging.INFO)
    monkeypatch.setattr(own, "handlers", [])
    monkeypatch.setattr(own, "level", logging.NOTSET)
    log_as_vllm()
    assert not own.handlers  # pytest has a log itself
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    for _ in range(2):
        log_as_vllm()
    assert own.handlers == [handler]
    assert own.level == logging.INFO


def test_what_the_backend_says_of_itself() -> None:
    from vllm_sparse_plugin.backend import SparseAttentionBackend

    assert SparseAttentionBackend.get_name() == "CUSTOM"
    assert not SparseAttentionBackend.is_sparse()
    assert not SparseAttentionBackend.supports_kv_connector()
    assert not SparseAttentionBackend.supports_kv_cache_update_bypass


@pytest.mark.parametrize(
    ("is_chosen", "configured", "served"), [(True, 64, 64), (False, 128, 128), (False, 16, 128)]
)
def test_block_size_that_workers_will_have(is_chosen: bool, configured: int, served: int) -> None:
    """vLLM 0.33 leaves the general default in the API server's configuration."""
    cache = SimpleNamespace(block_size=configured, user_specified_block_size=is_chosen)
    assert served_block_size(SimpleNamespace(cache_config=cache)) == served


def test_endpoint_protocol() -> None:
    from vllm.plugins.endpoint_plugins.interface import EndpointPlugin

    assert isinstance(create_endpoint_plugin(), EndpointPlugin)


def test_worker_base_gets_the_statistics_method() -> None:
    from vllm.v1.worker.worker_base import WorkerBase

    compat.install()
    assert callable(getattr(WorkerBase, compat.STATS_METHOD))


def test_kill_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(plugin.KILL_SWITCH, "1")
    monkeypatch.setattr(compat, "install", lambda: pytest.fail("installed in spite of the switch"))
    plugin.register()
