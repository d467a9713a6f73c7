"""Small models whose random weights are the same on every machine, bit for bit."""

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
_LLAMA: dict[str, Any] = {
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
_GRANITE: dict[str, Any] = {
    "attention_multiplier": HEAD_SIZE**-0.5,
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "logits_scaling": 1.0,
}
_MIXERS, _MIXER_SIZE, _STATE, _CONVOLUTION = 8, 32, 16, 4
"""Of a recurrent layer (Mamba 2): heads, their size, numbers of a state for each, and keys."""
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    # With learned attention sinks in every layer, and a window in one.
    "granite-swa": {
        **_LLAMA,
        **_GRANITE,
        "architectures": ["GraniteSWAForCausalLM"],
        "model_type": "granite_swa",
        "sliding_window": 64,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    },
    "granite-hybrid": {
        **_LLAMA,
        **_GRANITE,
        "architectures": ["GraniteMoeHybridForCausalLM"],
        "model_type": "granitemoehybrid",
        "layer_types": ["mamba", "attention", "mamba"],
        "position_embedding_type": "rope",
        "shared_intermediate_size": INNER,
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "mamba_n_heads": _MIXERS,
        "mamba_d_head": _MIXER_SIZE,
        "mamba_d_state": _STATE,
        "mamba_d_conv": _CONVOLUTION,
        "mamba_n_groups": 1,
        "mamba_expand": _MIXERS * _MIXER_SIZE // WIDTH,
    },
}
"""By the kind of model."""
_RANGE = 0.25
"""Of a weight: large enough that attention is not flat, and answers differ by what is read."""


_Shapes = dict[str, tuple[int, ...]]
_ATTENTION: _Shapes = {
    "self_attn.q_proj.weight": (HEADS * HEAD_SIZE, WIDTH),
    "self_attn.k_proj.weight": (KV_HEADS * HEAD_SIZE, WIDTH),
    "self_attn.v_proj.weight": (KV_HEADS * HEAD_SIZE, WIDTH),
    "self_attn.o_proj.weight": (WIDTH, HEADS * HEAD_SIZE),
}
_MLP: _Shapes = {
    "mlp.gate_proj.weight": (INNER, WIDTH),
    "mlp.up_proj.weight": (INNER, WIDTH),
    "mlp.down_proj.weight": (WIDTH, INNER),
}
_NORMS: _Shapes = {"input_layernorm.weight": (WIDTH,), "post_attention_layernorm.weight": (WIDTH,)}
_SHARED_MLP: _Shapes = {
    "shared_mlp.input_linear.weight": (2 * INNER, WIDTH),
    "shared_mlp.output_linear.weight": (WIDTH, INNER),
}
_INNER_MIXER = _MIXERS * _MIXER_SIZE
_MIXED = _INNER_MIXER + 2 * _STATE
_RECURRENT: _Shapes = {
    "mamba.in_proj.weight": (_INNER_MIXER + _MIXED + _MIXERS, WIDTH),
    "mamba.conv1d.weight": (_MIXED, 1, _CONVOLUTION),
    "mamba.conv1d.bias": (_MIXED,),
    "mamba.dt_bias": (_MIXERS,),
    "mamba.A_log": (_MIXERS,),
    "mamba.D": (_MIXERS,),
    "mamba.norm.weight": (_INNER_MIXER,),
    "mamba.out_proj.weight": (WIDTH, _INNER_MIXER),
}


def _layer_shapes(kind: str, layer: int) -> _Shapes:
    if kind == "granite-hybrid":
        is_recurrent = CONFIGS[kind]["layer_types"][layer] == "mamba"
        return (_RECURRENT if is_recurrent else _ATTENTION) | _SHARED_MLP | _NORMS
    sinks: _Shapes = {"self_attn.sinks": (HEADS,)} if kind == "granite-swa" else {}
    return _ATTENTION | _MLP | _NORMS | sinks


def _shapes(kind: str) -> _Shapes:
    shapes: _Shapes = {
        "model.embed_tokens.weight": (VOCABULARY, WIDTH),
        "lm_head.weight": (VOCABULARY, WIDTH),
        "model.norm.weight": (WIDTH,),
    }
    for layer in range(LAYERS):
        own = _layer_shapes(kind, layer)
        shapes |= {f"model.layers.{layer}.{name}": size for name, size in own.items()}
    return shapes


def weights(kind: str) -> dict[str, torch.Tensor]:
    """All of them.

    From numpy's `RandomState`, whose numbers its authors keep for good, and as multiples of powers
    of 2: torch's normal numbers differ between processors in their last bits.
    """
    random = np.random.RandomState(0)
    found = {}
    for name, size in _shapes(kind).items():
        numbers = random.randint(-1024, 1025, size).astype(np.float32) / np.float32(1024)
        is_row = len(size) == 1  # of a norm, a bias, a sink: about 1
        found[name] = torch.from_numpy(1 + numbers / 4 if is_row else numbers * np.float32(_RANGE))
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


def write_models(folder: Path) -> dict[str, str]:
    """A folder for each kind; see `write_model`.

    Args:
        folder: Of the folders, which are named as the kinds.

    Returns:
        The fingerprints of their weights.
    """
    return {kind: write_model(folder / kind, kind) for kind in CONFIGS}


def write_model(folder: Path, kind: str = "llama") -> str:
    """A folder that vLLM can load, with channels for Double Sparsity beside it.

    Args:
        folder: It is made.
        kind: Of the model.

    Returns:
        The fingerprint of its weights.
    """
    folder.mkdir(exist_ok=True)
    tensors = weights(kind)
    (folder / "config.json").write_text(json.dumps(CONFIGS[kind]))
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
