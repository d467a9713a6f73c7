"""The model whose decoding is measured, and at how many keys and requests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

LAYERS, QUERY_HEADS, KV_HEADS, HEAD_SIZE = 32, 32, 8, 128
LONGEST = 131072
LLAMA_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": QUERY_HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_SIZE,
    "hidden_act": "silu",
    "max_position_embeddings": LONGEST + 1024,  # a prompt of 128K, and its answer
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "torch_dtype": "bfloat16",
}
"""The shape of Llama-3.1-8B; weights are random."""
WEIGHT_BYTES = 15_010_000_000
"""That a decode step of it reads: all but the embedding, in bfloat16."""


@dataclass(frozen=True, order=True)
class EngineCell:
    """What an engine decodes at once.

    Attributes:
        keys: Of each prompt.
        requests: At once.
    """

    keys: int
    requests: int

    @property
    def name(self) -> str:
        """In tables and files."""
        return f"{self.keys} x {self.requests}"


def _cells(*pairs: tuple[int, tuple[int, ...]]) -> tuple[EngineCell, ...]:
    return tuple(EngineCell(keys, count) for keys, counts in pairs for count in counts)


SHORT = _cells(
    (1024, (1, 4, 16, 64)), (4096, (1, 4, 16, 64)), (8192, (1, 4, 16, 64)), (32768, (1, 4, 8, 16))
)
LONG = _cells((LONGEST, (1, 4, 6)))
QUICK = _cells((1024, (1, 16)), (8192, (1, 16)))
EVERY = (*SHORT, *LONG)
