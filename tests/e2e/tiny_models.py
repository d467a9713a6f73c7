"""Models of kinds that the plugin refuses or serves in part: tiny, with random weights."""

import shutil
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BloomConfig,
    DeepseekV2Config,
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    MistralConfig,
    PretrainedConfig,
)

SHAPE = {
    "vocab_size": 49152,  # of the tokenizer they borrow
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 512,
}
GROUPED = {**SHAPE, "num_key_value_heads": 1, "intermediate_size": 128}


def _configs() -> dict[str, tuple[PretrainedConfig, str]]:
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
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 128}
    bloom = BloomConfig(vocab_size=49152, hidden_size=64, n_layer=2, n_head=2)
    # One layer with a window, one that sees everything.
    mixed = {"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"]}
    mixed["tie_word_embeddings"] = False  # a tied random model repeats its last token
    return {
        "mla": (DeepseekV2Config(**SHAPE, **mla), "DeepseekV2ForCausalLM"),
        "encoder": (BertConfig(**SHAPE, intermediate_size=128), "BertModel"),
        "sinks": (GptOssConfig(**GROUPED, head_dim=64, **experts), "GptOssForCausalLM"),
        "alibi": (bloom, "BloomForCausalLM"),
        "softcap": (
            Gemma2Config(**GROUPED, head_dim=32, attn_logit_softcapping=50.0),
            "Gemma2ForCausalLM",
        ),
        "window": (MistralConfig(**GROUPED, sliding_window=64), "MistralForCausalLM"),
        "mixed": (
            Gemma3TextConfig(**GROUPED, head_dim=32, query_pre_attn_scalar=32, **mixed),
            "Gemma3ForCausalLM",
        ),
    }


def write_tiny_model(kind: str, folder: Path, tokenizer: str) -> Path:
    """A model folder.

    Args:
        kind: A key of `_configs`.
        folder: Where the model's own folder is made.
        tokenizer: Folder of the model whose tokenizer it borrows.
    """
    config, architecture = _configs()[kind]
    target = folder / kind
    target.mkdir()
    config.architectures = [architecture]
    config.dtype = "float32"
    config.save_pretrained(target)
    if kind == "mixed":
        torch.manual_seed(0)
        # Larger than the default, so that attention is not flat and answers differ by what is read.
        config.initializer_range = 0.3
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(target)
    for file in Path(tokenizer).glob("token*"):
        shutil.copy(file, target)
    return target
