"""Adapters on a tiny model."""

from collections.abc import Callable, Iterator

import pytest
import torch

from sparse_attention_hub import ModelAdapterHF


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
