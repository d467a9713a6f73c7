"""Adapters on a tiny model: random weights, the real tokenizer."""

from collections.abc import Callable, Iterator

import pytest
import torch

from sparse_attention_hub import ModelAdapterHF
from tests.e2e.tiny_models import write_tiny_model


@pytest.fixture(scope="session")
def tiny_path(model_path: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model that answers in milliseconds; it has no chat template."""
    return str(write_tiny_model("llama", tmp_path_factory.mktemp("models"), model_path))


@pytest.fixture
def make_tiny(tiny_path: str) -> Iterator[Callable[..., ModelAdapterHF]]:
    """Makes adapters of the tiny model, and closes them."""
    adapters: list[ModelAdapterHF] = []

    def make(config=None, **kwargs) -> ModelAdapterHF:
        arguments = {"model_kwargs": {"dtype": torch.float32}, "device": None, **kwargs}
        adapters.append(ModelAdapterHF(tiny_path, config, **arguments))
        return adapters[-1]

    yield make
    for adapter in adapters:
        adapter.close()
