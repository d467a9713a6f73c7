"""Counting, sharing and freeing of models; with a server whose models are plain objects."""

import threading
import weakref

import pytest

from sparse_attention_hub.adapters import (
    ModelCreationError,
    ModelServer,
    ModelServerConfig,
    ReferenceCountError,
    ResourceCleanupError,
    TokenizerCreationError,
)
from sparse_attention_hub.adapters.utils import generate_model_key, hash_kwargs


class Thing:
    """Something that can be referred to weakly."""


class Signals:
    """Between a test and a slow load; looks the same all the time, as keys need it."""

    def __init__(self) -> None:
        self.started, self.go_on = threading.Event(), threading.Event()


class FakeServer(ModelServer):
    fail_to_delete = False

    def _create_model(self, model_name, gpu_id, model_kwargs):
        if model_name == "broken":
            raise OSError("no such model")
        if model_name == "slow":
            model_kwargs["signals"].started.set()
            assert model_kwargs["signals"].go_on.wait(10)
        return Thing()

    def _create_tokenizer(self, tokenizer_name, tokenizer_kwargs):
        if tokenizer_name == "broken":
            raise OSError("no such tokenizer")
        return Thing()

    def _delete_model(self, model, gpu_id):
        if self.fail_to_delete:
            raise RuntimeError("stuck")

    def _delete_tokenizer(self, tokenizer):
        pass


class OtherServer(FakeServer):
    """Another class."""


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch):
    """A process without a server."""
    monkeypatch.setattr(ModelServer, "_instance", None)


@pytest.fixture
def server(fresh) -> FakeServer:
    return FakeServer(ModelServerConfig(delete_on_zero_reference=True))


def test_one_server_per_process(fresh) -> None:
    server = FakeServer(ModelServerConfig(delete_on_zero_reference=True))
    assert FakeServer() is server
    assert server.config.delete_on_zero_reference
    with pytest.raises(ValueError, match="FakeServer.*OtherServer"):
        OtherServer()
    with pytest.raises(ValueError, match="delete_on_zero_reference=False"):
        FakeServer(ModelServerConfig())


def test_shared_until_the_last_user_lets_go(server: FakeServer) -> None:
    model = server.get_model("m", None, {})
    assert server.get_model("m", None, {}) is model
    assert server.get_model("m", 0, {}) is not model
    assert server.get_model_stats()["total_references"] == 3
    gone = weakref.ref(model)
    del model
    assert server.clear_model("m", None, {})
    assert gone() is not None
    assert server.clear_model("m", None, {})
    assert gone() is None
    assert server.get_model_stats()["total_models"] == 1


def test_kept_at_zero_unless_configured_otherwise(fresh) -> None:
    server = FakeServer()
    server.get_model("m", None, {})
    server.clear_model("m", None, {})
    assert server.get_model_stats()["zero_reference_models"] == 1
    with pytest.raises(ReferenceCountError) as error:
        server.clear_model("m", None, {})
    assert error.value.current_count == 0
    assert server.cleanup_unused()["models"] == {"deleted": 1, "skipped": 0}
    assert not server.clear_model("m", None, {})


def test_force_is_needed_for_what_is_in_use(server: FakeServer) -> None:
    server.get_model("m", None, {})
    server.get_tokenizer("t", {})
    assert not server.release_memory_and_clean("m", None, {})
    assert server.release_memory_and_clean_all() == {"deleted": 0, "skipped": 1}
    assert server.release_memory_and_clean("m", None, {}, force_delete=True)
    assert not server.release_tokenizer_and_clean("t", {})
    assert server.release_tokenizers_and_clean_all(force_delete=True)["deleted"] == 1
    assert server.get_tokenizer_stats()["total_tokenizers"] == 0


def test_errors_are_wrapped_once(server: FakeServer) -> None:
    with pytest.raises(ModelCreationError) as error:
        server.get_model("broken", None, {})
    assert isinstance(error.value.original_error, OSError)
    assert str(error.value).count("no such model") == 1
    with pytest.raises(TokenizerCreationError, match="no such tokenizer"):
        server.get_tokenizer("broken", {})
    assert server.get_model_stats()["total_models"] == 0
    server.get_model("m", None, {})
    server.fail_to_delete = True
    with pytest.raises(ResourceCleanupError, match="stuck"):
        server.clear_model("m", None, {})


def test_a_load_does_not_block_other_models(server: FakeServer) -> None:
    signals = Signals()
    thread = threading.Thread(target=server.get_model, args=("slow", None, {"signals": signals}))
    thread.start()
    assert signals.started.wait(10)
    assert server.get_model("quick", None, {}) is not None
    signals.go_on.set()
    thread.join()
    assert server.get_model_stats()["total_models"] == 2


def test_users_at_the_same_time_share_one_load(server: FakeServer) -> None:
    signals = Signals()
    models = []
    threads = [
        threading.Thread(
            target=lambda: models.append(server.get_model("slow", None, {"signals": signals}))
        )
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    assert signals.started.wait(10)
    signals.go_on.set()
    for thread in threads:
        thread.join()
    assert len(set(map(id, models))) == 1
    assert server.get_model_stats()["total_references"] == 3


def test_keys() -> None:
    assert hash_kwargs({}) == "empty"
    assert hash_kwargs({"a": 1, "b": 2}) == hash_kwargs({"b": 2, "a": 1}) != hash_kwargs({"a": 1})
    assert len(hash_kwargs({"a": 1})) == 8
    assert generate_model_key("m", None, {}) == "m|cpu|empty"
    assert generate_model_key("m", 0, {}) == "m|0|empty"


def test_config_is_checked() -> None:
    with pytest.raises(ValueError, match="enable_stats_logging.*'no'"):
        ModelServerConfig(enable_stats_logging="no")
