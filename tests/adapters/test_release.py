"""What adapters hold, they let go; what the server frees, dies."""

import gc
import subprocess
import sys
import weakref
from contextlib import nullcontext

import pytest
import torch

from sparse_attention_hub import ModelAdapterHF, Request
from sparse_attention_hub.adapters import (
    ModelCreationError,
    ModelServer,
    ModelServerConfig,
    ModelServerHF,
    TokenizerCreationError,
)
from sparse_attention_hub.sparse_attention import (
    LocalMaskerConfig,
    QuestTopKMaskerConfig,
    ResearchAttentionConfig,
)
from tests.adapters.memory_check import memory_of_an_adapter

pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")

CONFIG = ResearchAttentionConfig([LocalMaskerConfig(4), QuestTopKMaskerConfig(8, 4)])
REQUEST = Request("The river Foo is 312 km long. " * 4, ["How long is it?", "Where is it?"])


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> ModelServerHF:
    """The process's server, new, and keeping nothing."""
    monkeypatch.setattr(ModelServer, "_instance", None)
    return ModelServerHF(ModelServerConfig(delete_on_zero_reference=True))


@pytest.fixture
def no_collector():
    """Nothing dies but by its last reference, or when somebody collects."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def references(server: ModelServerHF) -> tuple[int, int]:
    return (
        server.get_model_stats()["total_references"],
        server.get_tokenizer_stats()["total_references"],
    )


def use(adapter: ModelAdapterHF) -> None:
    with adapter.enable_sparse_mode():
        adapter.process_request(REQUEST, {"max_new_tokens": 2})


def test_with_lets_go(server, tiny_path: str, no_collector) -> None:
    with ModelAdapterHF(tiny_path, CONFIG) as adapter:
        assert references(server) == (1, 1)
        gone = weakref.ref(adapter.model), weakref.ref(adapter.tokenizer)
        use(adapter)
    assert adapter.model is adapter.tokenizer is None
    assert references(server) == (0, 0)
    assert [ref() for ref in gone] == [None, None]
    adapter.close()  # once more does nothing


def test_with_lets_go_after_an_error(server, tiny_path: str) -> None:
    with pytest.raises(KeyError), ModelAdapterHF(tiny_path):
        raise KeyError
    assert references(server) == (0, 0)


def test_del_lets_go(server, tiny_path: str, no_collector) -> None:
    adapter = ModelAdapterHF(tiny_path, CONFIG)
    gone = weakref.ref(adapter.model)
    use(adapter)
    del adapter
    assert references(server) == (0, 0)
    assert gone() is None


def test_the_last_of_two_users_frees(server, tiny_path: str) -> None:
    one, other = ModelAdapterHF(tiny_path, CONFIG), ModelAdapterHF(tiny_path)
    gone = weakref.ref(one.model)
    one.close()
    assert references(server) == (1, 1)
    assert gone() is other.model
    other.process_request(REQUEST, {"max_new_tokens": 1})
    del other
    assert gone() is None


def test_a_server_that_keeps_models_frees_them_when_told(
    monkeypatch: pytest.MonkeyPatch, tiny_path: str, no_collector
) -> None:
    monkeypatch.setattr(ModelServer, "_instance", None)
    server = ModelServerHF()
    with ModelAdapterHF(tiny_path, CONFIG) as adapter:
        gone = weakref.ref(adapter.model)
    assert gone() is not None
    with ModelAdapterHF(tiny_path) as adapter:
        assert adapter.model is gone()
    assert server.cleanup_unused() == {
        "models": {"deleted": 1, "skipped": 0},
        "tokenizers": {"deleted": 1, "skipped": 0},
    }
    assert gone() is None


def test_a_model_in_use_is_freed_by_force_alone(server, tiny_path: str) -> None:
    with ModelAdapterHF(tiny_path, model_kwargs={"torch_dtype": torch.float32}) as adapter:
        where = tiny_path, adapter.device, adapter.model_kwargs
        assert not server.release_memory_and_clean(*where)
        assert server.release_memory_and_clean(*where, force_delete=True)
        gone = weakref.ref(adapter.model)
        # Who still holds it may use it.
        adapter.process_request(REQUEST, {"max_new_tokens": 1})
    assert gone() is None


def test_a_request_leaves_nothing_behind(
    server, tiny_path: str, no_collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the maskers' caches nor the context's keys and values."""
    left: list[weakref.ref] = []
    make_session, prefill = ModelAdapterHF._session, ModelAdapterHF._prefill

    def session(self):
        made = make_session(self)
        left.append(weakref.ref(made))
        return made

    def cache(self, context_ids):
        made = prefill(self, context_ids)
        left.append(weakref.ref(made.layers[0].keys))
        return made

    monkeypatch.setattr(ModelAdapterHF, "_session", session)
    monkeypatch.setattr(ModelAdapterHF, "_prefill", cache)
    with ModelAdapterHF(tiny_path, CONFIG) as adapter:
        use(adapter)
        assert len(left) == 4  # one session is that of direct calls
        assert [ref() for ref in left] == [None] * 4


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        ({"model_kwargs": {"attn_implementation": "no such"}}, ModelCreationError),
        ({"tokenizer_kwargs": {"tokenizer_type": "no such"}}, TokenizerCreationError),
    ],
)
def test_an_adapter_that_cannot_be_made_holds_nothing(
    server, tiny_path: str, arguments: dict, kind: type
) -> None:
    with pytest.raises(kind, match="no such") as error:
        ModelAdapterHF(tiny_path, **arguments)
    assert references(server) == (0, 0)
    assert not isinstance(error.value.original_error, kind)
    assert str(error.value).count("cannot load") == 1


def test_an_unknown_model(server, tmp_path) -> None:
    with pytest.raises(ModelCreationError, match=str(tmp_path / "nothing")) as error:
        ModelAdapterHF(str(tmp_path / "nothing"))
    assert isinstance(error.value.original_error, (OSError, ValueError))


def tensor_bytes() -> int:
    """Bytes of all tensors that are alive."""
    gc.collect()
    storages = {
        thing.untyped_storage().data_ptr(): thing.untyped_storage().nbytes()
        for thing in gc.get_objects()
        if type(thing) in (torch.Tensor, torch.nn.Parameter)
    }
    return sum(storages.values())


def test_memory_returns(server, tiny_path: str) -> None:
    loaded, used, left = memory_of_an_adapter(tiny_path, "cpu", tensor_bytes)
    weights = 4 * 49152 * 128 * 2  # float32 embeddings and head, most of the model
    assert loaded > weights
    assert used < loaded + weights / 100
    assert left < weights / 100


def test_a_gpu_gets_its_memory_back_once_the_model_is_dead(
    server, tiny_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = server.get_model(tiny_path, None, {})
    gone, state = weakref.ref(model), []
    del model
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: state.append(gone()))
    assert server.clear_model(tiny_path, None, {})
    assert state == [None]


def test_the_end_of_a_process_is_quiet(tiny_path: str) -> None:
    script = (
        "import sys; from sparse_attention_hub import ModelAdapterHF, Request\n"
        "adapter = ModelAdapterHF(sys.argv[1], device=None)\n"
        "adapter.process_request(Request('a', 'b'), {'max_new_tokens': 1})\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script, tiny_path], capture_output=True, text=True, check=True
    )
    assert ended.stdout == ""
    assert "Exception ignored" not in ended.stderr
