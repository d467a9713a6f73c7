"""Tiny models with random weights: kinds that the plugin refuses, and architectures it serves."""

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BloomConfig,
    DeepseekV2Config,
    FalconH1Config,
    Gemma2Config,
    Gemma3TextConfig,
    Gemma4TextConfig,
    GemmaConfig,
    GptOssConfig,
    GraniteMoeHybridConfig,
    GraniteSWAConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

VOCABULARY = {"vocab_size": 49152}  # of the tokenizer they borrow
SHAPE = {
    **VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 512,
}
GROUPED = {**SHAPE, "num_key_value_heads": 1, "intermediate_size": 128}

LAYERS, HEADS = 3, 4
"""Of the models that are served."""

WINDOW = 64


def _refused() -> dict[str, tuple[PretrainedConfig, str]]:
    """Configurations with the name of their architecture; vLLM refuses them before any weight."""
    mla = {
        "num_key_value_heads": 2,
        "intermediate_size": 128,
        "moe_intermediate_size": 64,
        "first_k_dense_replace": 2,
        "kv_lora_rank": 32,
        "q_lora_rank": None,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 32,
        "v_head_dim": 32,
        "n_routed_experts": 2,
        "num_experts_per_tok": 1,
        "n_shared_experts": 1,
    }
    bloom = BloomConfig(**VOCABULARY, hidden_size=64, n_layer=2, n_head=2)
    return {
        "mla": (DeepseekV2Config(**SHAPE, **mla), "DeepseekV2ForCausalLM"),
        "encoder": (BertConfig(**SHAPE, intermediate_size=128), "BertModel"),
        "alibi": (bloom, "BloomForCausalLM"),
        "softcap": (
            Gemma2Config(**GROUPED, head_dim=32, attn_logit_softcapping=50.0),
            "Gemma2ForCausalLM",
        ),
    }


def _served() -> dict[str, PretrainedConfig]:
    """Each with what its architecture is known for: GQA, MHA or MQA, windows, recurrent layers."""

    def shape(kv_heads: int, tied: bool, **more: Any) -> dict[str, Any]:
        return {
            **VOCABULARY,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "num_key_value_heads": kv_heads,
            "max_position_embeddings": 512,
            "tie_word_embeddings": tied,
            "pad_token_id": 0,
            **more,
        }

    llama3_rope = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    }
    # Three quarters of a head's 32 numbers are rotated, two at a time. Prompts must be longer than
    # the original positions: below, transformers takes the short factors, vLLM still the long ones.
    long_rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.75,
        "short_factor": [1.0 + 0.02 * i for i in range(12)],
        "long_factor": [1.0 + 0.5 * i for i in range(12)],
    }
    mixed = ["sliding_attention", "full_attention", "sliding_attention"]
    # States so large that vLLM makes blocks larger. (On CPUs it computes one chunk.)
    recurrent = {
        "mamba_n_heads": 8,
        "mamba_d_head": 32,
        "mamba_d_state": 64,
        "mamba_n_groups": 1,
        "mamba_chunk_size": 512,
    }
    return {
        "llama": LlamaConfig(**shape(2, tied=False), rope_parameters=llama3_rope),
        "llama-mha": LlamaConfig(**shape(HEADS, tied=True)),
        "qwen2": Qwen2Config(**shape(2, tied=True)),
        "qwen3": Qwen3Config(**shape(2, tied=False), head_dim=64),
        "phi3": Phi3Config(**shape(HEADS, tied=False), sliding_window=None),
        # As in the real one, the window is longer than anything the model can see.
        "phi4-mini": Phi3Config(
            **shape(2, tied=True),
            rope_parameters=long_rope,
            original_max_position_embeddings=128,
            sliding_window=1024,
        ),
        "mistral": MistralConfig(**shape(2, tied=False), head_dim=64, sliding_window=None),
        "mistral-window": MistralConfig(**shape(2, tied=False), sliding_window=WINDOW),
        "gemma": GemmaConfig(**shape(1, tied=True), head_dim=64),
        "gemma3": Gemma3TextConfig(
            **shape(2, tied=False),  # a tied one repeats its last token
            head_dim=32,
            query_pre_attn_scalar=32,
            sliding_window=WINDOW,
            layer_types=mixed,
        ),
        # The last layer reads the first one's keys, and the heads of both are larger.
        "gemma4": Gemma4TextConfig(
            **shape(2, tied=False),
            head_dim=32,
            per_layer_config={"0": {"head_dim": 64}, "2": {"head_dim": 64}},
            num_kv_shared_layers=1,
            sliding_window=WINDOW,
            layer_types=["full_attention", "sliding_attention", "full_attention"],
            hidden_size_per_layer_input=16,
            vocab_size_per_layer_input=VOCABULARY["vocab_size"],
        ),
        "granite-hybrid": GraniteMoeHybridConfig(
            **shape(2, tied=False),
            **recurrent,
            layer_types=["mamba", "attention", "mamba"],
            position_embedding_type="rope",
            attention_multiplier=32**-0.5,
            num_local_experts=0,
            num_experts_per_tok=0,
            shared_intermediate_size=256,
        ),
        "falcon-h1": FalconH1Config(
            **shape(2, tied=False), **recurrent, head_dim=32, mamba_d_ssm=256
        ),
        # Learned attention sinks, in layers with a window and without.
        "granite-swa": GraniteSWAConfig(
            **shape(2, tied=False),
            attention_multiplier=32**-0.5,
            sliding_window=WINDOW,
            layer_types=["full_attention", "sliding_attention", "full_attention"],
        ),
        "gpt-oss": GptOssConfig(
            **shape(2, tied=False),
            head_dim=32,
            num_local_experts=2,
            num_experts_per_tok=1,
            sliding_window=WINDOW,
            layer_types=mixed,  # vLLM takes no others of this architecture
        ),
    }


REFUSED = tuple(_refused())
SERVED = tuple(_served())


def write_tiny_model(kind: str, folder: Path, tokenizer: str) -> Path:
    """A model folder.

    Args:
        kind: One of `REFUSED` (without weights) or `SERVED`.
        folder: Where the model's own folder is made.
        tokenizer: Folder of the model whose tokenizer it borrows.
    """
    target = folder / kind
    target.mkdir()
    if kind in REFUSED:
        config, architecture = _refused()[kind]
        config.architectures = [architecture]
        config.dtype = "float32"
        config.save_pretrained(target)
    else:
        _random_model(_served()[kind]).save_pretrained(target)
    for file in Path(tokenizer).glob("token*"):
        shutil.copy(file, target)
    return target


def _random_model(config: PretrainedConfig) -> Any:
    torch.manual_seed(0)
    # Larger than the default, so that attention is not flat and answers differ by what is read.
    config.initializer_range = 0.15
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            # Biases begin at 0 and norms at 1, where forgetting them would change nothing.
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model
