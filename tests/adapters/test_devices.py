"""Where models go and in which type; CUDA is imitated where a test needs one."""

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from sparse_attention_hub import ModelAdapterHF, Request
from sparse_attention_hub.adapters import ModelCreationError, ModelServerHF
from sparse_attention_hub.adapters.utils.model_utils import (
    default_device,
    device_name,
    loader_arguments,
)


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host that says it has two CUDA devices, the second one being the current one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def moves(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[object]]:
    """Where models that are loaded in the test were told to go; none goes there."""
    ModelServerHF().cleanup_unused()
    asked: list[object] = []

    def to(self, device):
        asked.append(device)
        return self

    monkeypatch.setattr(LlamaForCausalLM, "to", to)
    yield asked
    ModelServerHF().cleanup_unused()


@pytest.mark.parametrize(
    ("device", "where"),
    [
        (None, "cpu"),
        ("cpu", "cpu"),
        (0, "cuda:0"),
        (1, "cuda:1"),
        ("cuda", "cuda"),
        ("cuda:1", "cuda:1"),
        (torch.device("cuda", 1), "cuda:1"),
        (torch.device("cpu"), "cpu"),
    ],
)
def test_each_way_to_name_a_device(two_gpus, tiny_path, moves: list, device, where: str) -> None:
    with ModelAdapterHF(tiny_path, device=device) as adapter:
        assert adapter.device == device
        assert moves == [torch.device(where)]


def test_a_device_left_out_is_cuda_where_there_is_one(two_gpus, tiny_path: str, moves) -> None:
    assert default_device() == "cuda"
    with ModelAdapterHF(tiny_path) as adapter:
        assert adapter.device == "cuda"
        assert moves == [torch.device("cuda")]


def test_a_device_left_out_is_the_cpu_elsewhere(no_gpu, tiny_path: str) -> None:
    with ModelAdapterHF(tiny_path) as adapter:
        assert adapter.device == "cpu"
        assert adapter.sparse_attention_config is None
        assert adapter.process_request(Request("a", "b"), {"max_new_tokens": 1}).mode == "dense"


@pytest.mark.parametrize(
    ("device", "message"),
    [
        (2, "device 2: .*2 CUDA"),
        ("cuda:7", "cuda:7"),
        (True, "True"),
        (-1, "-1"),
        (10**30, "device 10000"),
        ("gpu", "device 'gpu'"),
        ("cuda:x", "device 'cuda:x'"),
        (1.5, "device 1.5"),
        ("xpu", "device 'xpu': this machine has none"),
    ],
)
def test_no_such_device(two_gpus, tiny_path: str, device, message: str) -> None:
    references = ModelServerHF().get_model_stats()["total_references"]
    with pytest.raises(ValueError, match=message):
        ModelAdapterHF(tiny_path, device=device)
    assert ModelServerHF().get_model_stats()["total_references"] == references


def test_no_cuda_at_all(no_gpu, tiny_path: str) -> None:
    with pytest.raises(ValueError, match="device 0: .*0 CUDA"):
        ModelAdapterHF(tiny_path, device=0)
    with pytest.raises(ModelCreationError, match="device 0"):
        ModelServerHF().get_model(tiny_path, 0, {})


def test_names_of_one_device_share_a_model(two_gpus, make_tiny, moves) -> None:
    models = [make_tiny(device=device).model for device in (1, "cuda:1", torch.device("cuda:1"))]
    models.append(make_tiny(device="cuda").model)  # the current one
    models.append(make_tiny(device=1, model_kwargs={"torch_dtype": torch.float32}).model)
    assert all(model is models[0] for model in models)
    assert make_tiny(device=0).model is not models[0]
    assert device_name(None) == device_name("cpu") == "cpu"


def test_a_device_map_places_the_model_alone(
    no_gpu, make_tiny, moves: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {}
    load = AutoModelForCausalLM.from_pretrained

    def from_pretrained(name, **kwargs):
        given.update(kwargs)
        return load(name, **kwargs)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    adapter = make_tiny(device=5, model_kwargs={"device_map": "auto", "dtype": torch.float32})
    assert given["device_map"] == "auto"
    assert moves == []
    details = adapter.process_request(Request("One two", " three"), {"max_new_tokens": 2}).details
    assert details[0].new_tokens == 2


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_both_names_of_the_type(make_tiny, name: str) -> None:
    adapter = make_tiny(model_kwargs={name: torch.bfloat16})
    assert adapter.model.dtype == adapter.torch_dtype == torch.bfloat16
    assert adapter.model_kwargs == {name: torch.bfloat16}
    assert loader_arguments(adapter.model_kwargs) == {"dtype": torch.bfloat16}


def test_two_types_at_once(make_tiny) -> None:
    both = {"dtype": torch.float32, "torch_dtype": torch.float32}
    assert loader_arguments(both) == {"dtype": torch.float32}
    with pytest.raises(ValueError, match="torch_dtype=torch.float16 and dtype=torch.float32"):
        make_tiny(model_kwargs={**both, "torch_dtype": torch.float16})
