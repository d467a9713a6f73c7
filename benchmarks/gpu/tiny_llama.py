"""A small Llama whose random weights are the same on every machine, bit for bit."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from sparse_attention_hub.sparse_attention.research_attention.maskers.fixed.implementations.utils.double_sparsity_utils import (  # noqa: E501
    channel_key,
)

VOCABULARY, WIDTH, LAYERS, HEADS, KV_HEADS, HEAD_SIZE, INNER = 2048, 128, 3, 4, 2, 32, 256
POSITIONS = 1024
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_SIZE,
    "hidden_act": "silu",
    "max_position_embeddings": POSITIONS,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "torch_dtype": "float32",
}
_RANGE = 0.25
"""Of a weight: large enough that attention is not flat, and answers differ by what is read."""


def _shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCABULARY, WIDTH),
        "lm_head.weight": (VOCABULARY, WIDTH),
        "model.norm.weight": (WIDTH,),
    }
    for layer in range(LAYERS):
        own = {
            "self_attn.q_proj": (HEADS * HEAD_SIZE, WIDTH),
            "self_attn.k_proj": (KV_HEADS * HEAD_SIZE, WIDTH),
            "self_attn.v_proj": (KV_HEADS * HEAD_SIZE, WIDTH),
            "self_attn.o_proj": (WIDTH, HEADS * HEAD_SIZE),
            "mlp.gate_proj": (INNER, WIDTH),
            "mlp.up_proj": (INNER, WIDTH),
            "mlp.down_proj": (WIDTH, INNER),
            "input_layernorm": (WIDTH,),
            "post_attention_layernorm": (WIDTH,),
        }
        shapes |= {f"model.layers.{layer}.{name}.weight": size for name, size in own.items()}
    return shapes


def weights() -> dict[str, torch.Tensor]:
    """All of them.

    From numpy's `RandomState`, whose numbers its authors keep for good, and as multiples of powers
    of 2: torch's normal numbers differ between processors in their last bits.
    """
    random = np.random.RandomState(0)
    found = {}
    for name, size in _shapes().items():
        numbers = random.randint(-1024, 1025, size).astype(np.float32) / np.float32(1024)
        is_norm = len(size) == 1
        found[name] = torch.from_numpy(1 + numbers / 4 if is_norm else numbers * np.float32(_RANGE))
    return found


def fingerprint(tensors: dict[str, torch.Tensor]) -> str:
    """Of their bytes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].numpy().tobytes())
    return digest.hexdigest()


def prompts(lengths: list[int]) -> list[list[int]]:
    """Token ids, different at every place."""
    random = np.random.RandomState(1)
    return [random.randint(3, VOCABULARY, size).tolist() for size in lengths]


def write_model(folder: Path) -> str:
    """A folder that vLLM can load, with channels for Double Sparsity beside it.

    Args:
        folder: Empty.

    Returns:
        The fingerprint of its weights.
    """
    tensors = weights()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file(tensors, folder / "model.safetensors")
    random = np.random.RandomState(2)
    channels = {
        channel_key(layer, "qk_proj"): [
            random.permutation(HEAD_SIZE).tolist() for _ in range(KV_HEADS)
        ]
        for layer in range(LAYERS)
    }
    (folder / CHANNELS).write_text(json.dumps(channels))
    return fingerprint(tensors)


CHANNELS = "channels.json.txt"
"""Not a name that vLLM looks at."""
