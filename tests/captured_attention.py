"""What each layer of the real model attends with, for tests on real tensors."""

from dataclasses import dataclass

import torch
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward


@dataclass
class LayerCall:
    """One layer's inputs, rotated; a batch of one, as transformers has it."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    scaling: float


def captured_layers(model_path: str, tokens: list[int]) -> list[LayerCall]:
    """Each layer's queries, keys and values in one dense pass in float32."""
    calls: list[LayerCall] = []

    def capture(module, query, key, value, attention_mask, scaling=None, **kwargs):
        calls.append(LayerCall(query, key, value, scaling))
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )

    AttentionInterface.register("captured", capture)
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    model.set_attn_implementation("captured")
    with torch.no_grad():
        model(torch.tensor([tokens]))
    return calls
