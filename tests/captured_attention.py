"""What each layer of the real model attends with, for tests on real tensors."""

import torch
from transformers import AutoModelForCausalLM

from sparse_attention_hub.adapters.attention_observation import LayerInputs, observed_attention


def captured_layers(model_path: str, tokens: list[int]) -> list[LayerInputs]:
    """Each layer's queries, keys and values in one dense pass in float32."""
    calls: list[LayerInputs] = []
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    with observed_attention(model, calls.append), torch.no_grad():
        model(torch.tensor([tokens]))
    return calls
